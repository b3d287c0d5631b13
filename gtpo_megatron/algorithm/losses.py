"""The GTPO loss (specification, sections 5 and 6)."""

from typing import Literal

import torch
from torch import Tensor

from gtpo_megatron.algorithm._checks import (
    check_all,
    check_floats,
    check_integers,
    check_lengths,
    check_shape,
)

REFERENCE_THRESHOLD = 0.7  # the authors' code: entropy_gate(mode="always", threshold=0.7), gamma 0.1
REFERENCE_GAMMA = 0.1
REFERENCE_ENTROPY_FLOOR = 1e-6  # its entropies are -sum p ln max(p, 1e-6)


def completion_normalizers(
    group_ids: Tensor,
    prefix: Tensor | None = None,
    suffix: Tensor | None = None,
    compat: Literal["paper", "reference"] = "paper",
) -> Tensor:
    """What each completion's loss is divided by besides its length: the `num_completions` of the losses, one number each.

    "paper": groups x size of the completion's group, for the mean over groups of the mean over a group; with groups of one
    size that is the number of completions. "reference": groups x max(1, prefix, suffix), because the authors' code sums over
    the group and divides by its (mistaken) count of conflict tokens. Call it on a whole step's completions, then index the
    result by micro-batch.

    Args:
        group_ids: [N] integers in any order, all completions of the step.
        prefix: [N] conflict run from the start; for "reference" only.
        suffix: [N] conflict run from the end; for "reference" only.
        compat: "paper" or "reference".

    Returns:
        [N] int64.

    Raises:
        ValueError: a wrong shape or type, missing runs for "reference", an unknown `compat`.
    """
    if compat not in ("paper", "reference"):
        raise ValueError(f'compat is {compat!r}: it must be "paper" or "reference"')
    if group_ids.dim() != 1:
        raise ValueError(f"group_ids must have shape [N], not {list(group_ids.shape)}")
    check_integers("group_ids", group_ids)
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    if compat == "paper":
        return size.numel() * size[group]
    if prefix is None or suffix is None:
        raise ValueError('prefix and suffix are missing: compat "reference" needs them')
    for name, run in (("prefix", prefix), ("suffix", suffix)):
        check_shape(name, run, tuple(group_ids.shape), "[N]")
        check_integers(name, run)
    return size.numel() * torch.maximum(prefix, suffix).long().clamp(min=1)


def gtpo_loss(
    logprobs: Tensor,
    mean_entropy: Tensor,
    weights: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    gate: Tensor,
    gamma: float,
    num_completions: int | Tensor,
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """The GTPO loss of a micro-batch: its share of the step's loss, to be summed over micro-batches and ranks.

    For one completion: -gate (A - gamma <H>) / (num_completions L) sum_t weight_t ratio_t, with ratio_t of value 1 and the
    gradient of the log-probability on policy, exp(logp - old logp) otherwise. No clipping, no KL, no gradient through
    the entropy. Tokens of weight 0 are not looked at (they may hold anything), so a rank that has only some of a
    completion's tokens passes weight 0 elsewhere, and the whole length.

    Args:
        logprobs: [N, L] log-probability of each token under the policy, nats; differentiable.
        mean_entropy: [N] mean entropy of each whole completion, nats; a constant.
        weights: [N, L] from `token_weights`.
        advantages: [N].
        lengths: [N] integers from 1 to L, of the whole completions.
        gate: [N] from `entropy_gate`.
        gamma: weight of the entropy term.
        num_completions: of the whole step, over all micro-batches and ranks; or [N], see `completion_normalizers`.
        old_logprobs: [N, L] of the policy that the step began with; None on policy.

    Returns:
        Scalar in the type of `logprobs`. NaN where a log-probability of weight other than 0, an entropy or a gate is NaN.

    Raises:
        ValueError: a wrong shape or type, a length of 0 or beyond L, `num_completions` below 1.
    """
    check_rows(logprobs, weights, advantages, lengths, num_completions, old_logprobs=old_logprobs)
    check_shape("mean_entropy", mean_entropy, tuple(lengths.shape), "[N]")
    check_shape("gate", gate, tuple(lengths.shape), "[N]")
    dtype = logprobs.dtype
    ratio = likelihood_ratio(logprobs, old_logprobs, weights != 0)
    per_completion = (ratio * weights.to(dtype)).sum(1)
    scale = gate.to(dtype) * (advantages.to(dtype) - gamma * mean_entropy.detach().to(dtype))
    return -(scale * per_completion / divisor(lengths, num_completions, dtype)).sum()


def likelihood_ratio(logprobs: Tensor, old_logprobs: Tensor | None, counted: Tensor) -> Tensor:
    """exp(logp - old logp) of the counted tokens [N, L]; the policy's own detached values are the old ones on policy.

    Elsewhere the exponent is the constant 0: garbage there must reach neither the value nor the gradient.
    """
    old = logprobs if old_logprobs is None else old_logprobs
    return torch.where(counted, logprobs - old.detach().to(logprobs.dtype), 0.0).exp()


def divisor(lengths: Tensor, num_completions: int | Tensor, dtype: torch.dtype) -> Tensor:
    """num_completions x length of each completion [N]."""
    return (lengths * num_completions).to(dtype)


def check_rows(
    logprobs: Tensor,
    weights: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    num_completions: int | Tensor,
    **others: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments that the losses share fit each other; `others` are [N, L] or None."""
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [N, L], not {list(logprobs.shape)}")
    check_floats("logprobs", logprobs)
    count, max_length = logprobs.shape
    for name, value in ({"weights": weights} | others).items():
        if value is not None:
            check_shape(name, value, (count, max_length), "[N, L]")
    check_shape("advantages", advantages, (count,), "[N]")
    check_lengths(lengths, count, max_length)
    if isinstance(num_completions, Tensor) and num_completions.dim():
        check_shape("num_completions", num_completions, (count,), "[N]")
        check_all("num_completions", num_completions, num_completions >= 1, "it must be at least 1")
    elif not num_completions >= 1:
        raise ValueError(f"num_completions is {num_completions}: it must be at least 1")
