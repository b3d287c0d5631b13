"""The loss head: per-token log-probability and entropy from hidden states, without holding [tokens, vocabulary].

One function, `token_statistics`, with two implementations of its tile operations: PyTorch (any device) and Triton
(NVIDIA GPUs). It knows torch and torch.distributed only, so that it can be tested and used alone.
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gtpo_megatron.policy.head import torch_head
from gtpo_megatron.policy.head.function import HeadPlan, LossHead, TileOperations
from gtpo_megatron.policy.head.tiles import plan_tiles, statistics_dtype

__all__ = ["TokenStatistics", "token_statistics"]


@dataclass(frozen=True)
class TokenStatistics:
    """What the objective needs to know of each of R response tokens."""

    logprobs: Tensor
    """[R] ln pi(target), float32 (float64 for float64 weights), differentiable"""
    entropy: Tensor
    """[R] nats over the full vocabulary, same type; carries no gradient unless `entropy_grad` was asked for. With an
    `entropy_floor`, -sum p ln max(p, floor)"""


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    entropy_floor: float | None = None,
    implementation: Literal["auto", "torch", "triton"] = "auto",
    token_tile: int | None = None,
    vocab_tile: int | None = None,
    main_grad: Tensor | None = None,
) -> TokenStatistics:
    """Log-probability of each target and entropy of each distribution softmax(hidden @ weight.T / temperature).

    Memory beyond the gradients themselves: a fixed workspace (`tiles.WORKSPACE_BYTES`) plus O(R) and, in the backward,
    one float32 [R, H]. The backward computes the logits again, tile by tile, save what a CPU keeps: those that fit in the
    workspace, and, where the weight's gradient is a tensor of its own (no `main_grad`), those that fit in that. It is then
    made by the forward already; so let the backward follow before the next forward.

    Args:
        hidden: [R, H] final hidden states at response positions, the same on every rank of `tp_group`.
        weight: [V_local, H] this rank's rows [rank * V_local, (rank + 1) * V_local) of the output weight, of hidden's
            type. Pass the Parameter itself when `main_grad` is given.
        targets: [R] int64 global token ids.
        vocab_size: the real vocabulary; rows of the padded vocabulary beyond it do not exist: they have no part in the
            softmax, and their gradient is zero.
        tp_group: the tensor-parallel group. The forward makes one MAX and one SUM all-reduce of O(R) in it, the
            backward none: the gradient of `hidden` is this rank's PARTIAL sum, to be reduced over the group by
            whatever brought `hidden` here (Megatron's copy-to or gather-from-sequence-parallel region).
        temperature: divides the logits.
        entropy_grad: let gradients flow through the entropy.
        entropy_floor: give -sum p ln max(p, floor) as entropy, a constant: what GTPO's authors' code computes, with 1e-6.
            It needs p, so the logits of a second, forward-only pass over the tiles (but for those that are kept) and one
            more SUM all-reduce of O(R); the tile operations are PyTorch's in either implementation.
        implementation: "auto" is Triton for CUDA tensors where Triton can be imported, else PyTorch.
        token_tile, vocab_tile: tile sizes, chosen from the workspace by default.
        main_grad: [V_local, H] buffer of any floating type (Megatron's `param.main_grad`) into which the weight's
            gradient is added. Then, as Megatron's fused accumulation does, `weight.grad_added_to_main_grad` is set to
            True if the attribute exists and a placeholder is returned as gradient, so that the data-parallel hooks run:
            zeros if `weight.zero_out_wgrad`, uninitialised otherwise. Without the attribute no gradient is returned.

    Raises:
        ValueError: shapes or types that do not fit, a temperature or a floor that is not positive, a floor together with
            `entropy_grad`, or, for CPU targets, an id outside the vocabulary, with its index. On a GPU the check would
            cost a synchronisation: there the log-probability of such an id is NaN. NaN and infinite logits give NaN
            statistics and gradients.
    """
    _check(hidden, weight, targets, vocab_size, temperature, main_grad)
    if entropy_floor is not None and (entropy_floor <= 0 or entropy_grad):
        raise ValueError(
            f"entropy_floor: {entropy_floor} must be above 0, and is not for entropy_grad={entropy_grad}"
        )
    rank, size = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
    first_id = rank * weight.shape[0]
    vocab_rows = min(max(vocab_size - first_id, 0), weight.shape[0])
    if size * weight.shape[0] < vocab_size:
        raise ValueError(
            f"weight: {size} shards of {weight.shape[0]} rows cannot hold a vocabulary of vocab_size={vocab_size}"
        )
    plan = HeadPlan(
        operations=_operations(implementation, hidden.device),
        tiles=plan_tiles(hidden, vocab_rows, token_tile, vocab_tile),
        first_id=first_id,
        vocab_rows=vocab_rows,
        vocab_size=vocab_size,
        tp_group=tp_group if size > 1 else None,
        temperature=temperature,
        entropy_grad=entropy_grad,
        entropy_floor=entropy_floor,
        dtype=statistics_dtype(hidden),
        main_grad=main_grad,
    )
    return TokenStatistics(*LossHead.apply(hidden, weight, targets, plan))


def _operations(implementation: str, device: torch.device) -> TileOperations:
    if implementation == "auto":
        has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        implementation = "triton" if has_triton else "torch"
    if implementation == "triton":
        from gtpo_megatron.policy.head.triton_head import OPERATIONS  # only here: Triton is optional

        return OPERATIONS
    if implementation == "torch":
        return torch_head.OPERATIONS
    raise ValueError(f"implementation: {implementation!r} is none of auto, torch, triton")


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float,
    main_grad: Tensor | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden and weight: expected [R, H] and [V_local, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight: types differ, {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 of shape [{hidden.shape[0]}], got {targets.dtype} of {list(targets.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(f"main_grad: shape {list(main_grad.shape)} is not the weight's {list(weight.shape)}")
    if targets.device.type == "cpu":
        outside = ((targets < 0) | (targets >= vocab_size)).nonzero()
        if outside.numel():
            index = int(outside[0])
            raise ValueError(
                f"targets[{index}]: id {int(targets[index])} is outside the vocabulary [0, {vocab_size})"
            )
