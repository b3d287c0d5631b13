"""From the statistics of a micro-batch's tokens to its share of the loss: GTPO, and the baselines that share its path.

Every objective is a sum over completions whose normaliser is that of the whole batch, so micro-batches, and ranks of every
kind, add up to the loss of the batch whatever the plan. Only the last pipeline stage calls these.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gtpo_megatron.algorithm import (
    REFERENCE_ENTROPY_FLOOR,
    REFERENCE_GAMMA,
    REFERENCE_THRESHOLD,
    completion_normalizers,
    entropy_gate,
    grpo_loss,
    gtpo_loss,
    importance_weights,
    sft_loss,
    token_weights,
)
from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.config.algorithm import GateConfig
from gtpo_megatron.policy.batch import MicroBatch
from gtpo_megatron.policy.head import TokenStatistics
from gtpo_megatron.trajectories.shares import BatchTable


@dataclass(frozen=True)
class Report:
    """What is to be known of a micro-batch besides its loss, without gradient."""

    completions: dict[str, Tensor] = field(default_factory=dict)  # [N] each, whole completions
    sums: dict[str, Tensor] = field(default_factory=dict)  # scalars, to be added over micro-batches and ranks


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch, and what it asks of the head beside log-probabilities and entropies."""

    loss: Callable[[MicroBatch, TokenStatistics], tuple[Tensor, Report]]
    entropy_floor: float | None = None  # see `token_statistics`


@dataclass(frozen=True)
class BatchConstants:
    """What the loss needs of the whole batch, [completions] each, on this rank's device."""

    advantages: Tensor  # float32
    prefix: Tensor  # int64
    suffix: Tensor  # int64
    normalizers: Tensor  # see completion_normalizers
    num_tokens: int

    @classmethod
    def of(cls, table: BatchTable, config: AlgorithmConfig, device: torch.device) -> "BatchConstants":
        """Read them off the batch's table."""
        groups, prefix, suffix = (
            torch.tensor(table.rows[name], dtype=torch.int64) for name in ("group", "prefix", "suffix")
        )
        return cls(
            advantages=torch.tensor(table.rows["advantage"], dtype=torch.float32, device=device),
            prefix=prefix.to(device),
            suffix=suffix.to(device),
            normalizers=completion_normalizers(groups, prefix, suffix, config.compat).to(device),
            num_tokens=table.tokens,
        )


def make_objective(
    config: AlgorithmConfig,
    constants: BatchConstants,
    initial_entropy: float,
    context_group: dist.ProcessGroup,
) -> Objective:
    """The loss of one micro-batch under the configured algorithm.

    `initial_entropy` is H_ini in nats, which only GTPO's gate looks at.
    """

    def loss(batch: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, Report]:
        if (
            not batch.indices
        ):  # a rank with nothing to do; the zero keeps the backward pass and its collectives
            return statistics.logprobs.sum(), Report()
        report = completion_report(batch, statistics, context_group)
        logprobs = batch.padded(statistics.logprobs)
        weights = batch.padded(torch.ones_like(statistics.logprobs))  # 1 for this rank's tokens
        if config.importance.level != "off":
            weights = weights * _importance(config, batch, statistics, context_group, report)
        if config.name == "gtpo":
            return _gtpo(config, constants, initial_entropy, batch, logprobs, weights, report), report
        if config.name == "grpo":
            return _grpo(config, constants, batch, logprobs, weights, report), report
        return sft_loss(logprobs, weights, constants.num_tokens), report

    return Objective(loss, REFERENCE_ENTROPY_FLOOR if config.compat == "reference" else None)


def entropy_weight(config: AlgorithmConfig) -> float:
    """gamma: how much the mean entropy counts beside the advantage."""
    return REFERENCE_GAMMA if config.compat == "reference" else config.gamma


def _gtpo(
    config: AlgorithmConfig,
    constants: BatchConstants,
    initial_entropy: float,
    batch: MicroBatch,
    logprobs: Tensor,
    weights: Tensor,
    report: Report,
) -> Tensor:
    index = list(batch.indices)
    advantages, prefix, suffix = (
        x[index] for x in (constants.advantages, constants.prefix, constants.suffix)
    )
    threshold, mode = config.gate.threshold, config.gate.mode
    if config.compat == "reference":
        mode = "always"
        if threshold == GateConfig.model_fields["threshold"].default:
            threshold = REFERENCE_THRESHOLD
    mean_entropy = report.completions["entropy"]
    gate = entropy_gate(mean_entropy, initial_entropy, threshold, mode, advantages)
    report.completions["gate"] = gate
    conflict = token_weights(
        prefix,
        suffix,
        batch.lengths,
        advantages,
        batch.max_length,
        config.positive_weight,
        config.compat,
        negative_weight=config.negative_weight,
    )
    return gtpo_loss(
        logprobs,
        mean_entropy,
        conflict * weights,
        advantages,
        batch.lengths,
        gate,
        entropy_weight(config),
        constants.normalizers[index],
        old_logprobs=_padded(batch, batch.old_logprobs),
    )


def _grpo(
    config: AlgorithmConfig,
    constants: BatchConstants,
    batch: MicroBatch,
    logprobs: Tensor,
    weights: Tensor,
    report: Report,
) -> Tensor:
    index = list(batch.indices)
    loss, diagnostics = grpo_loss(
        logprobs,
        weights,
        constants.advantages[index],
        batch.lengths,
        constants.normalizers[index],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        old_logprobs=_padded(batch, batch.old_logprobs),
        ref_logprobs=_padded(batch, batch.reference_logprobs),
        beta=config.kl_beta,
    )
    report.sums["clipped"] = diagnostics.clipped_low + diagnostics.clipped_high
    report.sums["kl"] = diagnostics.kl
    return loss


def _importance(
    config: AlgorithmConfig,
    batch: MicroBatch,
    statistics: TokenStatistics,
    context_group: dist.ProcessGroup,
    report: Report,
) -> Tensor:
    """Truncated importance weights [N, L]; a sequence's needs the tokens of all context-parallel ranks."""
    trainer = statistics.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    both = torch.stack([batch.padded(trainer), batch.padded(batch.sampled_logprobs)])
    if context_group.size() > 1:
        dist.all_reduce(both, group=context_group)
    importance = importance_weights(
        *both, batch.lengths, level=config.importance.level, cap=config.importance.cap
    )
    weighed = batch.lengths.sum() if config.importance.level == "token" else len(batch.indices)
    report.sums["importance_truncated"] = importance.truncated_share * weighed / context_group.size()
    return importance.weights


def completion_report(
    batch: MicroBatch, statistics: TokenStatistics, context_group: dist.ProcessGroup
) -> Report:
    """Mean entropy, and mean and largest |trainer - sampler| logprob, of each completion (all its tokens)."""
    gap = (statistics.logprobs.detach() - batch.sampled_logprobs).abs()
    sums = torch.stack([batch.per_completion(statistics.entropy.detach()), batch.per_completion(gap)])
    largest = batch.padded(gap).amax(dim=1)
    if context_group.size() > 1:
        dist.all_reduce(sums, group=context_group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=context_group)
    entropy, gap_mean = sums / batch.lengths
    return Report(completions={"entropy": entropy, "gap": gap_mean, "gap_max": largest})


def _padded(batch: MicroBatch, values: Tensor | None) -> Tensor | None:
    return None if values is None else batch.padded(values)
