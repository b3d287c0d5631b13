"""The loss head over vocabulary shards on gloo ranks, against one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gtpo_megatron.policy.head import token_statistics
from tests.parallel.pool import RankPool

pytestmark = pytest.mark.local_layers("there are none")
ROWS, WIDTH, VOCABULARY, PADDED = 23, 8, 90, 128
BORDERS = (0, 31, 32, 63, 64, VOCABULARY - 1)  # first and last ids of shards on 2 and 4 ranks


def make(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[: len(BORDERS)] = torch.tensor(BORDERS)[:rows]
    return hidden, weight, targets, torch.randn(2, rows, generator=generator).to(dtype)


def run_shard(
    rows: int, dtype: torch.dtype, entropy_grad: bool, bad_row: int | None = None
) -> dict[str, Any]:
    """This rank's shard of the head, its gradients, and the all-reduces it took part in."""
    hidden, weight, targets, (for_logprobs, for_entropy) = make(rows, dtype)
    if bad_row is not None:
        weight[bad_row] = torch.nan
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    counted = CountedAllReduces()
    with counted:
        statistics = token_statistics(
            hidden,
            shard,
            targets,
            vocab_size=VOCABULARY,
            tp_group=dist.group.WORLD,
            temperature=0.8,
            entropy_grad=entropy_grad,
            token_tile=10,
            vocab_tile=13,
        )
    forward = list(counted.operations)
    with counted:
        loss = (for_logprobs * statistics.logprobs).sum()
        if entropy_grad:
            loss = loss + (for_entropy * statistics.entropy).sum()
        loss.backward()
    return {
        "logprobs": statistics.logprobs.detach().numpy(),
        "entropy": statistics.entropy.detach().numpy(),
        "hidden": hidden.grad.numpy(),
        "weight": shard.grad.numpy(),
        "forward": forward,
        "backward": counted.operations[len(forward) :],
    }


class CountedAllReduces:
    """Records the operation and size of every all-reduce while entered."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, int]] = []

    def __enter__(self) -> None:
        self.original = dist.all_reduce

        def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
            self.operations.append((str(op).rsplit(".", 1)[-1], tensor.numel()))
            return self.original(tensor, op, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def whole(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One process's view: partial gradients of the hidden states summed, shards of the weight's joined."""
    return {
        "logprobs": torch.from_numpy(results[0]["logprobs"]),
        "entropy": torch.from_numpy(results[0]["entropy"]),
        "hidden": torch.from_numpy(sum(result["hidden"] for result in results)),
        "weight": torch.cat([torch.from_numpy(result["weight"]) for result in results]),
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_shards_equal_one_process(
    ranks: RankPool, size: int, dtype: torch.dtype, tolerance: float, entropy_grad: bool
) -> None:
    """On 4 ranks the last shard (ids 96 to 127) is padding throughout."""
    expected = whole(ranks.run(1, run_shard, ROWS, dtype, entropy_grad))
    results = ranks.run(size, run_shard, ROWS, dtype, entropy_grad)
    for name, value in whole(results).items():
        difference = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= tolerance, f"{name}: relative difference {difference:.2e}"
    for result in results:
        assert (result["logprobs"] == results[0]["logprobs"]).all()
        assert result["forward"] == [("MAX", ROWS), ("SUM", 3 * ROWS)]
        assert result["backward"] == []


def test_one_rank_needs_no_collective(ranks: RankPool) -> None:
    (result,) = ranks.run(1, run_shard, ROWS, torch.float32, False)
    assert result["forward"] == result["backward"] == []


def test_ranks_without_tokens_take_part(ranks: RankPool) -> None:
    for result in ranks.run(2, run_shard, 0, torch.float32, True):
        assert result["forward"] == [("MAX", 0), ("SUM", 0)]
        assert result["hidden"].shape == (0, WIDTH) and not result["weight"].any()


def test_nan_on_one_rank_is_seen_by_all(ranks: RankPool) -> None:
    for result in ranks.run(2, run_shard, ROWS, torch.float32, False, 70):
        for name in ("logprobs", "entropy", "hidden"):
            assert torch.from_numpy(result[name]).isnan().all(), name
