"""The head as one autograd function: the loops over tiles and the two all-reduces. What is done to a tile of logits
is left to an implementation (`TileOperations`)."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gtpo_megatron.policy.head.tiles import TilePlan, multiply, multiply_add, operand, spans, waiting_places

LARGEST_SHIFT = 1e4
"""Shifts of a maximum are cut here: exp(-1e4) is 0 in every type, and 0 * 1e4 is 0 where 0 * inf would be NaN."""


@dataclass(frozen=True)
class RunningStatistics:
    """Of each row, over the logits z seen so far; implementations update it in place."""

    maximum: Tensor
    """m = max z; -inf before the first tile"""
    total: Tensor
    """sum of exp(z - m)"""
    moment: Tensor
    """sum of exp(z - m) (z - m)"""
    target: Tensor
    """the target's logit, unshifted; 0 until its tile is seen"""

    def rows(self, span: slice) -> "RunningStatistics":
        """Some rows, sharing storage."""
        return RunningStatistics(self.maximum[span], self.total[span], self.moment[span], self.target[span])


class TileOperations(Protocol):
    """An implementation. `logits` is a contiguous [rows, columns] tile, `scratch` has its shape; `targets` [rows] counts
    from the tile's first column and may lie outside it."""

    def update(
        self, logits: Tensor, targets: Tensor, running: RunningStatistics, scratch: Tensor
    ) -> Tensor | None:
        """Take a tile into the running statistics. Returns what it subtracted from each row of `logits` in doing so,
        or None if it left them alone."""

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        log_total: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        scratch: Tensor,
    ) -> Tensor:
        """grad_logprobs (onehot - p) - grad_entropy p (ln p + entropy), with p = exp(logits - log_total): the loss's
        gradient with respect to a tile of logits, in scratch's type. Overwrites and returns `logits` or `scratch`."""


@dataclass(frozen=True)
class HeadPlan:
    """Everything about a call that is not an input tensor of the graph."""

    operations: TileOperations
    tiles: TilePlan
    first_id: int
    vocab_rows: int
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    temperature: float
    entropy_grad: bool
    entropy_floor: float | None
    dtype: torch.dtype
    main_grad: Tensor | None


@dataclass
class KeptTiles:
    """Logits of some tiles, from the forward for the first backward."""

    tiles: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """by first row and column, with what was already subtracted from their rows"""
    lent: Tensor | None = None
    """[V_local, H] the memory of the weight's gradient to come, in which most of them wait (`waiting_places`)"""


class LossHead(torch.autograd.Function):
    """(hidden, weight, targets, plan) -> (logprobs, entropy)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, plan: HeadPlan
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.kept = plan, KeptTiles()
        if ctx.needs_input_grad[1] and plan.main_grad is None and hidden.device.type == "cpu":
            ctx.kept.lent = _unwritten(weight, targets, plan)
        running = _scan(hidden, weight, targets, plan, ctx.kept if any(ctx.needs_input_grad) else None)
        logprobs, entropy, log_total = _reduce(running, targets, plan)
        if plan.entropy_floor is not None:
            entropy = _floored_entropy(hidden, weight, log_total, plan, plan.entropy_floor, ctx.kept.tiles)
        ctx.save_for_backward(hidden, weight, targets, log_total, entropy)
        if not plan.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        plan: HeadPlan = ctx.plan
        hidden, weight, targets, log_total, entropy = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        fused = need_weight and plan.main_grad is not None
        grad_hidden = (
            torch.zeros(hidden.shape, dtype=plan.dtype, device=hidden.device) if need_hidden else None
        )
        lent, ctx.kept.lent = ctx.kept.lent, None
        grad_weight = plan.main_grad if fused else None
        if need_weight and not fused:
            grad_weight = lent if lent is not None else _unwritten(weight, targets, plan)
        incoming = Incoming(
            targets,
            log_total,
            entropy,
            grad_logprobs / plan.temperature,
            grad_entropy / plan.temperature if plan.entropy_grad else None,
        )
        _accumulate(hidden, weight, incoming, plan, ctx.kept.tiles, grad_hidden, grad_weight)
        return (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            _placeholder(weight) if fused else grad_weight,
            None,
            None,
        )


@dataclass(frozen=True)
class Incoming:
    """What the backward knows of each row: the forward's results, and the loss's gradients by them."""

    targets: Tensor
    log_total: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor | None

    def gradient(
        self, plan: HeadPlan, rows: slice, start: int, logits: Tensor, shift: Tensor | None, scratch: Tensor
    ) -> Tensor:
        """The gradient of a tile whose first column is `start`."""
        return plan.operations.gradient(
            logits,
            self.targets[rows] - (plan.first_id + start),
            self.log_total[rows] if shift is None else self.log_total[rows] - shift,
            self.entropy[rows],
            self.grad_logprobs[rows],
            None if self.grad_entropy is None else self.grad_entropy[rows],
            scratch,
        )


def _accumulate(
    hidden: Tensor,
    weight: Tensor,
    incoming: Incoming,
    plan: HeadPlan,
    kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]],
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Add to `grad_hidden`, add to or (if it is not the plan's main_grad) write `grad_weight`, tile by tile."""
    fused = grad_weight is not None and grad_weight is plan.main_grad
    left = operand(hidden, plan.dtype)
    logits_buffer, scratch_buffer = _workspace(left, plan)
    for columns in spans(plan.vocab_rows if len(hidden) else 0, plan.tiles.vocab_tile):
        right = operand(weight[columns], plan.dtype)
        grad_columns = _accumulator(grad_weight, columns, plan)
        for rows in spans(len(hidden), plan.tiles.token_tile):
            # A kept tile is consumed: a second backward through a retained graph computes it again.
            waiting, shift = kept.pop((rows.start, columns.start), (None, None))
            logits = _view(logits_buffer, rows, columns)
            if waiting is not None:
                logits.copy_(waiting)  # the product below may be written where they waited
            else:
                multiply(left[rows], right.t(), logits, scale=1 / plan.temperature)
            scratch = _view(scratch_buffer, rows, columns)
            grad_logits = incoming.gradient(plan, rows, columns.start, logits, shift, scratch)
            if grad_hidden is not None:
                multiply_add(grad_logits, right, grad_hidden[rows])
            if grad_columns is not None:
                # The first product writes where there is nothing yet to add to.
                adds = rows.start > 0 or (fused and grad_weight.dtype == plan.dtype)
                (multiply_add if adds else multiply)(grad_logits.t(), left[rows], grad_columns)
        if grad_columns is not None and grad_columns.dtype != grad_weight.dtype:
            grad_weight[columns] = grad_columns + grad_weight[columns] if fused else grad_columns


def _scan(
    hidden: Tensor, weight: Tensor, targets: Tensor, plan: HeadPlan, kept: KeptTiles | None
) -> RunningStatistics:
    """This rank's statistics of every row; tiles that fit in the plan's allowance are put into `kept`."""
    running = RunningStatistics(
        maximum=torch.full(targets.shape, -torch.inf, dtype=plan.dtype, device=hidden.device),
        total=torch.zeros(targets.shape, dtype=plan.dtype, device=hidden.device),
        moment=torch.zeros(targets.shape, dtype=plan.dtype, device=hidden.device),
        target=torch.zeros(targets.shape, dtype=plan.dtype, device=hidden.device),
    )
    left = operand(hidden, plan.dtype)
    logits_buffer, scratch_buffer = _workspace(left, plan)
    allowance = plan.tiles.kept_bytes if kept is not None else 0
    lent, places = _lent_memory(kept, targets.numel(), plan)
    for columns in spans(plan.vocab_rows, plan.tiles.vocab_tile):
        right = operand(weight[columns], plan.dtype)
        for rows in spans(targets.numel(), plan.tiles.token_tile):
            logits = _view(logits_buffer, rows, columns)
            place = places.get((rows.start, columns.start))
            keeps = place is not None or logits.nbytes <= allowance
            if place is not None:
                logits = _view(lent[place:], rows, columns)
            elif keeps:
                allowance -= logits.nbytes
                logits = torch.empty_like(logits)
            multiply(left[rows], right.t(), logits, scale=1 / plan.temperature)
            shift = plan.operations.update(
                logits,
                targets[rows] - (plan.first_id + columns.start),
                running.rows(rows),
                _view(scratch_buffer, rows, columns),
            )
            if keeps:
                kept.tiles[rows.start, columns.start] = logits, shift
    return running


def _lent_memory(
    kept: KeptTiles | None, rows: int, plan: HeadPlan
) -> tuple[Tensor | None, dict[tuple[int, int], int]]:
    """The lent memory as one row of logits, and where in it each tile may wait."""
    if kept is None or kept.lent is None:
        return None, {}
    flat = kept.lent[: plan.vocab_rows].view(-1)
    narrower = plan.dtype.itemsize // flat.element_size()
    flat = flat[: flat.numel() // narrower * narrower].view(plan.dtype)
    return flat, waiting_places(plan.tiles, rows, plan.vocab_rows, flat.numel())


def _reduce(running: RunningStatistics, targets: Tensor, plan: HeadPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the whole vocabulary -> (logprobs, entropy, log of the sum of exponentials), each [R]."""
    maximum = running.maximum.clone()
    if plan.tp_group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=plan.tp_group)
    # A rank all of whose rows are padding has -inf here; a NaN stays one, and the sum carries it to every rank.
    shift = (running.maximum - maximum).clamp(min=-LARGEST_SHIFT)
    factor = shift.exp()
    local = targets - plan.first_id
    owned = (local >= 0) & (local < plan.vocab_rows)
    packed = torch.stack(
        (
            running.total * factor,
            (running.moment + running.total * shift) * factor,
            torch.where(owned, running.target - maximum, 0.0),
        )
    )
    if plan.tp_group is not None:
        dist.all_reduce(packed, dist.ReduceOp.SUM, group=plan.tp_group)
    total, moment, target = packed
    log_total = total.log()
    outside = (targets < 0) | (targets >= plan.vocab_size)
    logprobs = torch.where(outside, torch.nan, target - log_total)
    return logprobs, log_total - moment / total, maximum + log_total


def _floored_entropy(
    hidden: Tensor,
    weight: Tensor,
    log_total: Tensor,
    plan: HeadPlan,
    floor: float,
    kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """-sum p ln max(p, floor) of each row [R] over the whole vocabulary. Kept tiles are read, and stay as they are."""
    entropy = torch.zeros_like(log_total)
    left = operand(hidden, plan.dtype)
    logits_buffer, scratch_buffer = _workspace(left, plan)
    for columns in spans(plan.vocab_rows, plan.tiles.vocab_tile):
        right = operand(weight[columns], plan.dtype)
        for rows in spans(len(hidden), plan.tiles.token_tile):
            buffer, scratch = _view(logits_buffer, rows, columns), _view(scratch_buffer, rows, columns)
            logits, shift = kept.get((rows.start, columns.start), (buffer, None))
            if logits is buffer:
                multiply(left[rows], right.t(), logits, scale=1 / plan.temperature)
            rest = log_total[rows] if shift is None else log_total[rows] - shift
            logprobs = torch.sub(logits, rest.unsqueeze(1), out=buffer)
            probabilities = torch.exp(logprobs, out=scratch if scratch.dtype == plan.dtype else None)
            entropy[rows] -= logprobs.clamp_(min=math.log(floor)).mul_(probabilities).sum(1)
    if plan.tp_group is not None:
        dist.all_reduce(entropy, dist.ReduceOp.SUM, group=plan.tp_group)
    return entropy


def _workspace(left: Tensor, plan: HeadPlan) -> tuple[Tensor, Tensor]:
    """Storage of one tile's logits, and of its scratch in the factors' type."""
    size = plan.tiles.token_tile * plan.tiles.vocab_tile
    return left.new_empty(size, dtype=plan.dtype), left.new_empty(size)


def _view(storage: Tensor, rows: slice, columns: slice) -> Tensor:
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return storage[: height * width].view(height, width)


def _accumulator(grad_weight: Tensor | None, columns: slice, plan: HeadPlan) -> Tensor | None:
    """Where a span's weight gradient is summed over the tokens: in place, or in float32 first if it is kept narrower."""
    if grad_weight is None or grad_weight.dtype == plan.dtype:
        return None if grad_weight is None else grad_weight[columns]
    return torch.empty(grad_weight[columns].shape, dtype=plan.dtype, device=grad_weight.device)


def _unwritten(weight: Tensor, targets: Tensor, plan: HeadPlan) -> Tensor:
    """A weight gradient that is zero where no tile will write: in padded rows, and everywhere if there are no tokens."""
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_weight[plan.vocab_rows if targets.numel() else 0 :].zero_()
    return grad_weight


def _placeholder(weight: Tensor) -> Tensor | None:
    """What stands for the gradient of a weight whose main_grad already has it (Megatron's protocol)."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
