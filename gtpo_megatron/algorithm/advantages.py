"""Advantages of the completions of a group (specification, sections 1 and 7)."""

from typing import Literal

import torch
from torch import Tensor

from gtpo_megatron.algorithm._checks import check_all, check_integers, check_shape

ROUNDING = 4 * torch.finfo(torch.float64).eps


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    normalize: Literal["mean", "std"] = "mean",
    *,
    eps: float = 1e-4,
) -> Tensor:
    """Reward of each completion relative to its group.

    "mean" is GTPO's `R_i - mean_j R_j`; "std" is GRPO's `(R_i - mean_j R_j) / (std_j R_j + eps)` with the sample standard
    deviation (n - 1, as TRL has it; 0 for a group of one). An advantage no larger than the rounding of the rewards is
    exactly 0: its sign decides which side of a conflict the completion stands on, and 0.1 + 0.2 + 0.3 must not decide it.

    Args:
        rewards: [N], any real type.
        group_ids: [N] integers in any order; groups may differ in size.
        normalize: "mean" or "std".
        eps: added to the standard deviation.

    Returns:
        [N] advantages in the type of `rewards` (the default floating-point type for integers).

    Raises:
        ValueError: a wrong shape or type, a NaN or infinite reward (with its index), an unknown `normalize`.
    """
    if normalize not in ("mean", "std"):
        raise ValueError(f'normalize is {normalize!r}: it must be "mean" or "std"')
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [N], not {list(rewards.shape)}")
    check_shape("group_ids", group_ids, tuple(rewards.shape), "[N]")
    check_integers("group_ids", group_ids)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    check_all("rewards", rewards, rewards.isfinite(), "a reward must be finite")
    if not rewards.numel():
        return rewards.to(dtype)

    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    exact = rewards.double()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(size.numel()).index_add_(0, group, values)

    def extreme(values: Tensor, which: str) -> Tensor:
        return values.new_zeros(size.numel()).scatter_reduce_(0, group, values, which, include_self=False)

    # Measured from the group's least reward, equal rewards give advantages of exactly 0 whatever the group's size.
    above = exact - extreme(exact, "amin")[group]
    advantages = above - (total(above) / size)[group]
    rounding = ROUNDING + (torch.finfo(rewards.dtype).eps if rewards.is_floating_point() else 0.0)
    noise = advantages.abs() <= rounding * extreme(exact.abs(), "amax")[group]
    advantages = advantages.masked_fill(noise, 0.0)
    if normalize == "std":
        deviation = (total(advantages.square()) / (size - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation + eps)[group]
    return advantages.to(dtype)
