"""The loss of a micro-batch from given statistics of its tokens, against the formulas written out token by token."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.policy.batch import MicroBatch, make_micro_batch
from gtpo_megatron.policy.head import TokenStatistics
from gtpo_megatron.policy.objective import BatchConstants, Report, make_objective
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable
from tests.policy.test_batch import trajectory

ALONE: Any = SimpleNamespace(size=lambda: 1)  # the context-parallel group of one rank

# One group: A = +2 with runs that overlap in one of its three tokens, A = -1 with runs of 1 and 1 of four, A = -1 without
# runs. The entropies are on both sides of ln 2, of 0.7 and of 1.02.
BATCH: list[Trajectory] = [
    replace(trajectory(2, 3, 100), advantage=2.0, prefix=2, suffix=2),
    replace(trajectory(3, 4, 200), advantage=-1.0, prefix=1, suffix=1),
    replace(trajectory(1, 2, 300), advantage=-1.0),
]
ENTROPIES = (0.2, 0.695, 0.9)  # mean of each completion
GAPS = (
    -0.2,
    -0.1,
    -0.1,
    0.3,
    0.1,
    0.0,
    0.05,
    0.1,
    0.05,
)  # trainer's logprob less the sampler's, of each token


def statistics() -> tuple[MicroBatch, TokenStatistics]:
    batch = make_micro_batch(BATCH, range(3))
    logprobs = torch.linspace(-1.8, -0.2, 9, requires_grad=True)
    batch = replace(batch, sampled_logprobs=logprobs.detach() - torch.tensor(GAPS))
    entropy = torch.tensor(ENTROPIES)[batch.completion] + torch.tensor(
        [-0.1, 0.1, 0, -0.2, 0.2, -0.1, 0.1, 0.1, -0.1]
    )
    return batch, TokenStatistics(logprobs, entropy)


def measured(**algorithm: Any) -> tuple[list[float], Report]:
    """The gradient of each token's logprob, and the report, with H_ini below every threshold."""
    config = AlgorithmConfig(**algorithm)
    batch, tokens = statistics()
    constants = BatchConstants.of(BatchTable.of(BATCH), config, torch.device("cpu"))
    loss, report = make_objective(config, constants, 0.1, ALONE).loss(batch, tokens)
    loss.backward()
    return tokens.logprobs.grad.tolist(), report


def expected(
    gate: tuple[int, int, int], gamma: float, weights: list[float], divisors: tuple[float, ...]
) -> list[float]:
    """-delta (A - gamma H) lambda / divisor of each token: what the ratio's gradient is on policy."""
    of = [0] * 3 + [1] * 4 + [2] * 2
    return [
        -gate[i] * (BATCH[i].advantage - gamma * ENTROPIES[i]) * weight / divisors[i]
        for i, weight in zip(of, weights, strict=True)
    ]


def test_gtpo_follows_the_papers_formula() -> None:
    gradient, report = measured(gamma=0.2)
    # the threshold is ln 2 = 0.693: 0.695 is above it; the weight is 2 once where the runs overlap
    weights = [2.0, 2.0, 2.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert gradient == pytest.approx(expected((1, 0, 0), 0.2, weights, (9.0, 12.0, 6.0)), abs=1e-6)
    assert report.completions["gate"].tolist() == [1, 0, 0]
    assert report.completions["entropy"].tolist() == pytest.approx(ENTROPIES, abs=1e-6)


@pytest.mark.parametrize(("threshold", "gate"), [(None, (1, 1, 0)), (1.02, (1, 1, 1)), (0.5, (1, 0, 0))])
def test_compat_reference_follows_the_authors_code(
    threshold: float | None, gate: tuple[int, int, int]
) -> None:
    own = {} if threshold is None else {"gate": {"threshold": threshold}}
    gradient, report = measured(compat="reference", gamma=0.3, **own)
    # 0.7 unless another is asked for; gamma 0.1 whatever is; the weight squared where the runs overlap; summed over the
    # group, and divided by the larger run as well
    weights = [2.0, 4.0, 2.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert gradient == pytest.approx(expected(gate, 0.1, weights, (3 * 2.0, 4 * 1.0, 2.0)), abs=1e-6)
    assert report.completions["gate"].tolist() == list(gate)


@pytest.mark.parametrize(("level", "count"), [("token", 9), ("sequence", 3)])
def test_importance_weights_are_capped_and_counted_by_their_level(level: str, count: int) -> None:
    cap = 1.25
    gradient, report = measured(gate={"mode": "off"}, importance={"level": level, "cap": cap})
    plain, _ = measured(gate={"mode": "off"})
    batch, tokens = statistics()
    gap = tokens.logprobs.detach() - batch.sampled_logprobs
    if level == "sequence":
        gap = batch.per_completion(gap)
    above = (gap.exp() > cap).sum().item()
    assert 0 < above < count and len(gap) == count
    assert report.sums["importance_truncated"].item() == pytest.approx(above)
    ratio = gap.exp().clamp(max=cap)
    ratio = ratio[batch.completion] if level == "sequence" else ratio
    assert gradient == pytest.approx([g * r for g, r in zip(plain, ratio.tolist(), strict=True)], abs=1e-6)


@pytest.mark.parametrize(("compat", "floor"), [("paper", None), ("reference", 1e-6)])
def test_the_entropy_has_the_authors_floor_in_compat_alone(compat: Any, floor: float | None) -> None:
    config = AlgorithmConfig(compat=compat)
    constants = BatchConstants.of(BatchTable.of(BATCH), config, torch.device("cpu"))
    assert make_objective(config, constants, 0.1, ALONE).entropy_floor == floor


def test_grpo_counts_what_is_clipped_on_both_sides() -> None:
    config = AlgorithmConfig(name="grpo", clip_low=0.1, clip_high=0.2)
    batch, tokens = statistics()
    ratios = torch.tensor(
        [1.3, 1.1, 0.5, 0.8, 0.95, 1.5, 0.85, 1.0, 0.7]
    )  # A > 0: above 1.2; A < 0: below 0.9
    batch = replace(batch, old_logprobs=tokens.logprobs.detach() - ratios.log())
    constants = BatchConstants.of(BatchTable.of(BATCH), config, torch.device("cpu"))
    _, report = make_objective(config, constants, 0.1, ALONE).loss(batch, tokens)
    assert report.sums["clipped"].item() == 1 + 3
    assert report.sums["kl"].item() == 0


def test_sft_is_the_mean_over_the_tokens_of_the_batch() -> None:
    gradient, _ = measured(name="sft")
    assert gradient == pytest.approx([-1 / 9] * 9)


def test_the_gap_is_that_of_trainer_and_sampler() -> None:
    _, report = measured()
    assert report.completions["gap_max"].tolist() == pytest.approx([0.2, 0.3, 0.1], abs=1e-6)
    assert report.completions["gap"].tolist() == pytest.approx([0.4 / 3, 0.45 / 4, 0.15 / 2], abs=1e-6)


def test_a_rank_without_tokens_has_no_loss_and_a_backward_pass() -> None:
    batch = make_micro_batch(BATCH, [])
    logprobs = torch.zeros(batch.sampled_logprobs.numel(), requires_grad=True)
    constants = BatchConstants.of(BatchTable.of(BATCH), AlgorithmConfig(), torch.device("cpu"))
    loss, report = make_objective(AlgorithmConfig(), constants, 0.1, ALONE).loss(
        batch, TokenStatistics(logprobs, torch.zeros_like(logprobs))
    )
    loss.backward()
    assert loss.item() == 0 and logprobs.grad is not None
    assert (report.completions, report.sums) == ({}, {})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_context_parallel_ranks_add_what_they_hold(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks that hold the same: sums are twice, the largest once, shares are of both."""
    config = AlgorithmConfig(gate={"mode": "off"}, importance={"level": level, "cap": 1.25})
    group: Any = SimpleNamespace(size=lambda: 2)

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        assert group.size() == 2
        if op == dist.ReduceOp.SUM:
            tensor *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    batch, tokens = statistics()
    constants = BatchConstants.of(BatchTable.of(BATCH), config, torch.device("cpu"))
    _, report = make_objective(config, constants, 0.1, group).loss(batch, tokens)
    gap = 2 * (tokens.logprobs.detach() - batch.sampled_logprobs)
    gap = batch.per_completion(gap) if level == "sequence" else gap
    above = (gap.exp() > 1.25).sum().item()
    assert above > 0
    assert report.sums["importance_truncated"].item() == pytest.approx(above / 2)
    assert report.completions["entropy"].tolist() == pytest.approx([2 * h for h in ENTROPIES], abs=1e-6)
    assert report.completions["gap"].tolist() == pytest.approx([0.8 / 3, 0.9 / 4, 0.3 / 2], abs=1e-6)
    assert report.completions["gap_max"].tolist() == pytest.approx([0.2, 0.3, 0.1], abs=1e-6)
