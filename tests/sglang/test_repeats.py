"""Transfers to plain receivers of which one is lost on the way: one repeat, without it, from one stage and from two."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.common.receiver import BROADCAST, Receiver
from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import NamedTensor
from gtpo_megatron.rollout.sglang.engine import SGLangEngine
from gtpo_megatron.rollout.sglang.servers.states import Timing
from gtpo_megatron.rollout.sglang.weights.buckets import lay_out
from gtpo_megatron.rollout.sglang.weights.stages import StageSender

BUCKET = 4096
BUCKETS = 4  # of each stage
LIMIT_S = 10.0


def stage_weights(version: int, stage: int) -> list[NamedTensor]:
    return [(f"{stage}.{i}", torch.full((1000,), float(10 * version + i))) for i in range(BUCKETS)]


class Trainer:
    """Rank 0 with its engine, and the sender of a second stage, if there are two, fed by a thread of its own."""

    def __init__(self, stack: ExitStack, checkpoint: Path, urls: list[str], stages: int) -> None:
        config, timing = SGLangConfig(urls=tuple(urls)), Timing(collective_s=LIMIT_S)
        engine = SGLangEngine(config, str(checkpoint), "fp32", checkpoint / "logs", "cpu", timing)
        self.engine = stack.enter_context(closing(engine))
        self.stages = stages
        own, other = (lay_out(stage_weights(0, stage), BUCKET) for stage in range(2))
        self.sender = stack.enter_context(closing(StageSender(1, "127.0.0.1", other, LIMIT_S, LIMIT_S)))
        self.engine.follow_stages(own, [(self.sender.address, other)] if stages == 2 else [])

    def update(self, version: int, weights: Iterator[NamedTensor] | None = None) -> None:
        beside = threading.Thread(target=self.sender.update, args=(stage_weights(version, 1),))
        if self.stages == 2:
            beside.start()
        try:
            self.engine.update_weights(weights or stage_weights(version, 0), version)
        finally:
            if self.stages == 2:
                beside.join(60.0)
                assert not beside.is_alive()

    def until_states(self, expected: dict[str, str]) -> None:
        """A server that failed is examined, and brought to the weights, after the update."""
        deadline = time.monotonic() + 60.0
        while self.engine.status() != expected:
            assert time.monotonic() < deadline, self.engine.status()
            time.sleep(0.02)

    def has_reached(self, receiver: Receiver, version: int) -> bool:
        expected = dict(weight for stage in range(self.stages) for weight in stage_weights(version, stage))
        held = receiver.tensors
        return held.keys() == expected.keys() and all(held[name].equal(expected[name]) for name in held)


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen3")


@contextmanager
def receiver_that_dies(path: str, number: int) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.common.receiver", "--die-at", f"{path}:{number}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
            assert process.wait(60.0) == 1  # it was asked, and died
        finally:
            process.kill()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    "path, number, repeated",
    [
        ("/begin_weight_update", 2, False),
        ("/init_weights_update_group", 1, True),
        (BROADCAST, BUCKETS + 2, True),
        ("/end_weight_update", 2, False),
    ],
)
def test_a_server_that_is_killed_costs_at_most_one_repeat_without_it(
    checkpoint: Path, path: str, number: int, repeated: bool, stages: int
) -> None:
    if path == BROADCAST:
        number += (stages - 1) * BUCKETS
    with ExitStack() as stack:
        url = stack.enter_context(receiver_that_dies(path, number))
        survivor = Receiver(limit_s=LIMIT_S)
        trainer = Trainer(stack, checkpoint, [url, survivor.url], stages)
        trainer.update(0)
        trainer.update(1)
        assert trainer.has_reached(survivor, 1)
        trainer.until_states({url: "down", survivor.url: "ready"})
        assert survivor.asked["/begin_weight_update"] == (3 if repeated else 2)
        if path == BROADCAST:  # no more was sent of the attempt that had broken off
            assert survivor.asked[BROADCAST] == stages * BUCKETS + 2 + stages * BUCKETS


def test_a_server_that_refuses_a_bucket_is_left_out_and_brought_to_the_weights_later(
    checkpoint: Path,
) -> None:
    def errs(path: str, count: int) -> None:
        if (path, count) == (BROADCAST, BUCKETS * 2 + 2):
            raise RuntimeError("out of memory")

    with ExitStack() as stack:
        erring, other = Receiver(errs), Receiver()
        trainer = Trainer(stack, checkpoint, [erring.url, other.url], 2)
        trainer.update(0)
        trainer.update(1)
        trainer.until_states({erring.url: "ready", other.url: "ready"})
        assert trainer.has_reached(other, 1)
        assert trainer.has_reached(erring, 1)  # from the copies, the second stage's too
        assert other.asked["/begin_weight_update"] == 3
        trainer.update(2)
        assert trainer.has_reached(erring, 2)


def test_an_update_that_fails_on_rank_0_lets_the_other_senders_go_on(checkpoint: Path) -> None:
    def failing() -> Iterator[NamedTensor]:
        yield stage_weights(0, 0)[0]
        raise ValueError("the export failed")

    with ExitStack() as stack:
        receiver = Receiver()
        trainer = Trainer(stack, checkpoint, [receiver.url], 2)
        with pytest.raises(ValueError, match="the export failed"):
            trainer.update(0, failing())
        trainer.update(1)
        assert trainer.has_reached(receiver, 1)


def test_an_export_that_fails_on_another_rank_is_raised_with_the_rank(checkpoint: Path) -> None:
    with ExitStack() as stack:
        receiver = Receiver()
        trainer = Trainer(stack, checkpoint, [receiver.url], 2)
        wrong = [("0.1", torch.zeros(3)), *stage_weights(0, 1)[1:]]

        def other() -> None:
            with pytest.raises(RuntimeError, match=r"brought 0.1 \(3,\) in place of 1.0"):
                trainer.sender.update(wrong)

        beside = threading.Thread(target=other)
        beside.start()
        with pytest.raises(RuntimeError, match=r"rank 1, filled of weights: .* in place of 1.0"):
            trainer.engine.update_weights(stage_weights(0, 0), 0)
        beside.join()


def test_copies_are_not_sent_once_the_next_update_has_begun(checkpoint: Path) -> None:
    """Their memory takes the new weights: a server that is being restored must not get some of each."""
    with ExitStack() as stack:
        receiver = Receiver()
        trainer = Trainer(stack, checkpoint, [receiver.url], 2)
        trainer.update(0)
        (stage,) = trainer.engine._stages
        kept = stage.kept(1)[0]
        beside = threading.Thread(target=trainer.sender.update, args=(stage_weights(1, 1),))
        beside.start()
        asyncio.run(stage.filled(2, 0))
        with pytest.raises(
            RuntimeError, match="rank 1, send of weights: .* bucket 0 of update 1 is not held any more"
        ):
            asyncio.run(stage.send(kept))
        trainer.engine.update_weights(stage_weights(1, 0), 1)
        beside.join()
        assert trainer.has_reached(receiver, 1)
