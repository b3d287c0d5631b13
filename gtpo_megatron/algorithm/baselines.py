"""Losses that GTPO is compared with: GRPO and supervised fine-tuning (section 7); and importance sampling for all."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gtpo_megatron.algorithm._checks import check_all, check_floats, check_lengths, check_shape
from gtpo_megatron.algorithm.losses import check_rows, divisor, likelihood_ratio


@dataclass(frozen=True)
class GrpoDiagnostics:
    """Sums over the counted tokens of a micro-batch, without gradient: add them over micro-batches and ranks, then divide."""

    tokens: Tensor  # number of counted tokens
    clipped_low: Tensor  # tokens whose ratio the lower bound replaced (negative advantage)
    clipped_high: Tensor  # tokens whose ratio the upper bound replaced (positive advantage)
    ratio: Tensor  # sum of ratios
    kl: Tensor  # sum of k3 estimates of KL(policy || reference), nats; 0 without a reference

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens that are clipped; 0 without tokens."""
        return (self.clipped_low + self.clipped_high) / self.tokens.clamp(min=1)

    @property
    def mean_kl(self) -> Tensor:
        """Mean KL per token, nats; 0 without tokens."""
        return self.kl / self.tokens.clamp(min=1)


def grpo_loss(
    logprobs: Tensor,
    weights: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    num_completions: int | Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, GrpoDiagnostics]:
    """The GRPO loss of a micro-batch: its share of the step's loss, to be summed over micro-batches and ranks.

    For one completion: 1 / (num_completions L) sum_t [-weight_t min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    + beta k3_t], k3 = exp(ref - logp) - (ref - logp) - 1 (arXiv 2402.03300, equations 3 and 4). Tokens of weight 0 are
    not looked at, as in `gtpo_loss`; the KL term is not weighted.

    Args:
        logprobs: [N, L] log-probability of each token under the policy, nats; differentiable.
        weights: [N, L], 1 or an importance weight for each token that counts, 0 for the others.
        advantages: [N], from `group_advantages(normalize="std")`.
        lengths: [N] integers from 1 to L, of the whole completions.
        num_completions: of the whole step; or [N], see `completion_normalizers`.
        clip_low: lower clipping range.
        clip_high: upper clipping range.
        old_logprobs: [N, L] of the policy that the step began with; None on policy.
        ref_logprobs: [N, L] of the frozen reference policy; needed where `beta` is not 0, only watched where it is.
        beta: weight of the KL term.

    Returns:
        The scalar loss in the type of `logprobs`, and diagnostics.

    Raises:
        ValueError: a wrong shape or type, a length of 0 or beyond L, `num_completions` below 1, a `beta` other than
            0 without `ref_logprobs`.
    """
    check_rows(
        logprobs,
        weights,
        advantages,
        lengths,
        num_completions,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
    )
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs are missing: beta is {beta}, not 0")
    dtype = logprobs.dtype
    counted = weights != 0
    advantage = advantages.to(dtype).unsqueeze(1)
    ratio = likelihood_ratio(logprobs, old_logprobs, counted)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantage, clipped * advantage) * weights.to(dtype)
    kl = torch.zeros_like(per_token)
    if ref_logprobs is not None:
        gap = torch.where(counted, ref_logprobs.detach().to(dtype) - logprobs, 0.0)
        kl = torch.expm1(gap) - gap
        per_token = per_token + beta * kl
    loss = (per_token.sum(1) / divisor(lengths, num_completions, dtype)).sum()

    with torch.no_grad():
        diagnostics = GrpoDiagnostics(
            tokens=counted.sum(),
            clipped_low=((ratio < 1 - clip_low) & (advantage < 0) & counted).sum(),
            clipped_high=((ratio > 1 + clip_high) & (advantage > 0) & counted).sum(),
            ratio=torch.where(counted, ratio, 0.0).sum(),
            kl=kl.sum(),
        )
    return loss, diagnostics


def sft_loss(logprobs: Tensor, weights: Tensor, num_tokens: int | Tensor) -> Tensor:
    """Cross-entropy of a micro-batch: -sum_t weight_t logp_t / num_tokens, the mean over the step's tokens once summed.

    The mean is over tokens, not completions, as is usual for supervised fine-tuning: each token of a long solution counts
    as much as one of a short solution.

    Args:
        logprobs: [N, L] log-probability of each token under the policy, nats; differentiable.
        weights: [N, L], 1 for each solution token present here, 0 for the others, which are not looked at.
        num_tokens: solution tokens of the whole step, over all micro-batches and ranks.

    Returns:
        Scalar in the type of `logprobs`.

    Raises:
        ValueError: a wrong shape or type, `num_tokens` below 1.
    """
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [N, L], not {list(logprobs.shape)}")
    check_floats("logprobs", logprobs)
    check_shape("weights", weights, tuple(logprobs.shape), "[N, L]")
    if not num_tokens >= 1:
        raise ValueError(f"num_tokens is {num_tokens}: it must be at least 1")
    counted = torch.where(weights != 0, logprobs, 0.0)
    return -(counted * weights.to(logprobs.dtype)).sum() / num_tokens


@dataclass(frozen=True)
class ImportanceWeights:
    """Truncated importance weights between trainer and sampler, without gradient."""

    weights: Tensor  # [N, L], 0 beyond the length; multiply token weights by it
    truncated_share: Tensor  # scalar: share of the tokens ("token") or completions ("sequence") above the cap


def importance_weights(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    lengths: Tensor,
    *,
    level: Literal["token", "sequence"],
    cap: float,
) -> ImportanceWeights:
    """min(cap, p_trainer / p_sampler) of each token, or of each whole completion (the product over its tokens).

    Corrects for a sampler whose probabilities differ from those of the trainer at the same weights (other kernels, other
    precision) or whose weights are older. Give whole completions: a product over a part of them is not the sequence's.

    Args:
        trainer_logprobs: [N, L] of the trainer's policy, nats.
        sampler_logprobs: [N, L] as reported by the sampler at the same temperature, nats.
        lengths: [N] integers from 1 to L; what stands beyond them is not looked at.
        level: "token" or "sequence".
        cap: the largest weight.

    Returns:
        Weights in the type of `trainer_logprobs`, and the share that the cap cut.

    Raises:
        ValueError: a wrong shape or type, a length of 0 or beyond L, an unknown level, a cap that is not above 0, a
            log-probability of the sampler that is NaN or infinite (with its completion's index).
    """
    if level not in ("token", "sequence"):
        raise ValueError(f'level is {level!r}: it must be "token" or "sequence"')
    if not cap > 0:
        raise ValueError(f"cap is {cap}: it must be above 0")
    if trainer_logprobs.dim() != 2:
        raise ValueError(f"trainer_logprobs must have shape [N, L], not {list(trainer_logprobs.shape)}")
    check_floats("trainer_logprobs", trainer_logprobs)
    check_shape("sampler_logprobs", sampler_logprobs, tuple(trainer_logprobs.shape), "[N, L]")
    count, max_length = trainer_logprobs.shape
    check_lengths(lengths, count, max_length)

    inside = torch.arange(max_length, device=lengths.device) < lengths.unsqueeze(1)
    sampler = torch.where(inside, sampler_logprobs.detach().to(trainer_logprobs.dtype), 0.0)
    total = sampler.sum(1)
    check_all("sampler_logprobs", total, total.isfinite(), "the sampler's log-probabilities must be finite")
    gap = torch.where(inside, trainer_logprobs.detach(), 0.0) - sampler
    if level == "sequence":
        gap = gap.sum(1, keepdim=True)
    ratio = gap.exp()
    weights = torch.where(inside, ratio.clamp(max=cap), 0.0)
    above = ratio > cap if level == "sequence" else (ratio > cap) & inside
    units = max(1, count) if level == "sequence" else lengths.sum().clamp(min=1)
    return ImportanceWeights(weights, above.sum() / units)
