"""What the loss multiplies: weights of tokens (section 3) and the entropy filter of completions (section 4)."""

import math
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

Compat = Literal["paper", "reference"]
GateMode = Literal["paper", "always", "only_negative", "off"]


def token_weights(
    prefix: Tensor,
    suffix: Tensor,
    lengths: Tensor,
    advantages: Tensor,
    max_length: int,
    positive_weight: float = 2.0,
    compat: Compat = "paper",
    *,
    negative_weight: float = 0.0,
) -> Tensor:
    """Weight of each token in the loss: 1 without conflict; `negative_weight` (GTPO: 0) or `positive_weight` in conflict, by
    the advantage's sign.

    Args:
        prefix: [N] conflict run from the start, tokens.
        suffix: [N] conflict run from the end, tokens.
        lengths: [N] integers from 1 to `max_length`.
        advantages: [N]; only their signs are used. Where it is 0, every token weighs 1.
        max_length: L, the number of columns of the result.
        positive_weight: weight of a conflict token of a completion with positive advantage.
        compat: "reference" squares the weight where a token stands in both runs, as the authors' code does.
        negative_weight: weight of a conflict token of a completion with negative advantage; 1 protects nothing.

    Returns:
        [N, max_length] float32; 0 beyond the length.

    Raises:
        ValueError: a wrong shape or type, a length of 0 or beyond `max_length`, a run longer than its completion, a NaN
            advantage, an unknown `compat`.
    """
    if compat not in ("paper", "reference"):
        raise ValueError(f'compat is {compat!r}: it must be "paper" or "reference"')
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have shape [N], not {list(lengths.shape)}")
    check_lengths(lengths, lengths.numel(), max_length)
    for name, run in (("prefix", prefix), ("suffix", suffix)):
        check_shape(name, run, tuple(lengths.shape), "[N]")
        check_integers(name, run)
        check_all(name, run, (run >= 0) & (run <= lengths), "a run is from 0 to the completion's length")
    check_shape("advantages", advantages, tuple(lengths.shape), "[N]")
    check_all("advantages", advantages, ~advantages.isnan(), "its sign must be known")

    position = torch.arange(max_length, device=lengths.device)
    column = lengths.unsqueeze(1)
    in_prefix = position < prefix.unsqueeze(1)
    in_suffix = position >= column - suffix.unsqueeze(1)
    of_conflict = torch.ones_like(advantages, dtype=torch.float32)
    of_conflict = of_conflict.masked_fill(advantages > 0, positive_weight).masked_fill(
        advantages < 0, negative_weight
    )
    weights = torch.where(in_prefix | in_suffix, of_conflict.unsqueeze(1), 1.0)
    if compat == "reference":
        weights = torch.where(in_prefix & in_suffix, weights.square(), weights)
    return weights.masked_fill(position >= column, 0.0)


def entropy_gate(
    mean_entropy: Tensor,
    initial_entropy: float,
    threshold: float = math.log(2.0),
    mode: GateMode = "paper",
    advantages: Tensor | None = None,
) -> Tensor:
    """Which completions take part in the loss: 1 or 0 each.

    "paper": all, while the policy's initial entropy is above the threshold; otherwise those whose mean entropy is at or
    below it. "only_negative": as "paper", but only completions with a negative advantage are ever dropped. "always": drops
    by the threshold whatever the initial entropy was (the authors' code). "off": drops none.

    Args:
        mean_entropy: [N] mean entropy of each completion's tokens, nats.
        initial_entropy: mean of `mean_entropy` over the first batch before any update, nats; unused by "always" and "off".
        threshold: nats; ln 2 is the provable one.
        mode: see above.
        advantages: [N]; "only_negative" needs it, the others ignore it.

    Returns:
        [N] of 0 and 1 in the type of `mean_entropy`; NaN where that is NaN, so that a broken forward pass shows in the loss.

    Raises:
        ValueError: a wrong shape or type, an unknown mode, a NaN initial entropy that is needed, missing advantages.
    """
    if mode not in ("paper", "always", "only_negative", "off"):
        raise ValueError(f'mode is {mode!r}: it must be "paper", "always", "only_negative" or "off"')
    if mean_entropy.dim() != 1:
        raise ValueError(f"mean_entropy must have shape [N], not {list(mean_entropy.shape)}")
    check_floats("mean_entropy", mean_entropy)
    if mode in ("paper", "only_negative") and math.isnan(initial_entropy):
        raise ValueError(f'initial_entropy is NaN: mode "{mode}" compares it with the threshold')
    if mode == "only_negative" and advantages is None:
        raise ValueError('advantages are missing: mode "only_negative" needs them')
    if advantages is not None:
        check_shape("advantages", advantages, tuple(mean_entropy.shape), "[N]")

    mean_entropy = mean_entropy.detach()
    if mode == "off" or (mode != "always" and initial_entropy > threshold):
        return torch.ones_like(mean_entropy)
    kept = mean_entropy <= threshold
    if mode == "only_negative":
        kept = kept | (advantages >= 0)
    return kept.to(mean_entropy.dtype).masked_fill(mean_entropy.isnan(), math.nan)
