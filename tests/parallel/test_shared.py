"""Weights that every rank gathers for servers on its own GPU: the same on all, a bucket at a time, and errors together.

Handles are names here; tests/gpu opens real ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, SharedBucket
from gtpo_megatron.rollout.sglang.weights.transfer import _payloads
from tests.parallel.pool import RankPool

BUCKET_BYTES = 40_000
LAYOUTS = {
    "dp2": ("qwen3", 2, {}),
    "tp2-pp2": ("qwen3", 4, {"tensor": 2, "pipeline": 2}),
    "ep2": ("qwen3_moe", 2, {"expert": 2}),
}


class Reader:
    """Rank 0's engine: reads a bucket while the next one is made, as servers do; fails at the one of a number."""

    def __init__(self, log: Path, failing: int | None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.handles: list[dict[int, str]] = []
        self.version = -1
        self._log, self._failing = log, failing

    def update_from_buckets(self, buckets: Iterator[SharedBucket], version: int) -> None:
        waiting = None
        for number, bucket in enumerate(buckets):
            if number == self._failing:
                raise UserError("no server is left")
            self._read(waiting)
            waiting = number, bucket
        self._read(waiting)
        self.version = version

    def _read(self, waiting: tuple[int, SharedBucket] | None) -> None:
        if waiting is None:
            return
        number, bucket = waiting
        self.tensors |= {name: tensor.clone() for name, tensor in bucket.tensors()}
        self.handles.append(dict(bucket.handles))
        say(self._log, f"read {number}")


def say(log: Path, what: str) -> None:
    with log.open("a") as file:
        file.write(f"{what}\n")


def publish(
    checkpoint: Path, parallel: ParallelConfig, log: Path, failing: int | None, broken_rank: int | None
) -> Any:
    from gtpo_megatron.policy.model import build_policy, export_hf_weights, initialize_parallel, world_rank
    from gtpo_megatron.run import weights
    from gtpo_megatron.run.weights import SharedWeights

    rank = world_rank()
    made: list[int] = []

    def handle(bucket: Bucket) -> tuple[int, str]:
        say(log, f"rank {rank} made {len(made)}")
        made.append(len(made))
        if rank == broken_rank and len(made) == 3:
            raise UserError("no memory")
        return rank, f"{bucket.names[0]} on {rank}"

    initialize_parallel(parallel, seed=0)
    policy = build_policy(ModelConfig(path=str(checkpoint), dtype="bf16"), parallel, TrainingConfig(steps=1))
    reader = Reader(log, failing) if rank == 0 else None
    with patch.object(weights, "gpu_handle", handle):
        shared = SharedWeights(policy, BUCKET_BYTES, reader)
        try:
            flow = shared.publish(7)
        except UserError as error:
            return str(error)
    whole = dict(export_hf_weights(policy))
    if reader is None:
        return len(made)
    assert reader.version == 7
    assert whole.keys() == reader.tensors.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in reader.tensors.items())
    assert flow.amount == sum(tensor.nbytes for tensor in whole.values())
    return reader.handles, [layout.names[0] for layout in shared.layouts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_each_bucket_until_it_is_read(
    layout: str, ranks: RankPool, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    family, world, parallel = LAYOUTS[layout]
    log = tmp_path / "log"
    (handles, names), *others = ranks.run(
        world, publish, tiny_checkpoint(family), ParallelConfig(**parallel), log, None, None
    )
    assert len(names) > 5 and others == [len(names)] * (world - 1)
    assert handles == [{rank: f"{name} on {rank}" for rank in range(world)} for name in names]
    lines = log.read_text().splitlines()
    for number in range(len(names) - 2):
        read = lines.index(f"read {number}")
        assert all(lines.index(f"rank {rank} made {number + 2}") > read for rank in range(world))


def test_servers_that_fail_end_the_transfer_on_all_ranks(
    ranks: RankPool, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    parallel = ParallelConfig(tensor=2, pipeline=2)
    found = ranks.run(4, publish, tiny_checkpoint("qwen3"), parallel, tmp_path / "log", 2, None)
    assert found == ["no server is left"] * 4


def test_a_rank_that_fails_ends_the_transfer_on_all_ranks(
    ranks: RankPool, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    parallel = ParallelConfig(tensor=2, pipeline=2)
    found = ranks.run(4, publish, tiny_checkpoint("qwen3"), parallel, tmp_path / "log", None, 3)
    assert found == ["no memory"] * 4


def test_a_server_is_given_what_lies_on_its_own_gpus() -> None:
    flat = torch.zeros(4, dtype=torch.uint8)
    described = (("a",), (torch.float32,), (torch.Size([1]),), flat)
    shared = SharedBucket(*described, {gpu: f"on {gpu}" for gpu in range(4)})
    targets = [Target("http://a", 2, 0), Target("http://b", 2, 2)]
    assert list(_payloads(shared, targets).values()) == [["on 0", "on 1"], ["on 2", "on 3"]]
    first, second = _payloads(Bucket(*described), targets).values()  # the copy in host memory: its bytes
    assert len({*first, *second}) == 1 and [len(first), len(second)] == [2, 2]
