"""Tile operations as Triton kernels, for NVIDIA GPUs: one pass over a tile each, between the products that cuBLAS does.

The products take nearly all of the time, and cuBLAS is the fastest at them; what is worth fusing is everything else.
A tile of float32 logits is written once and read once, at 1/H of the products' arithmetic. With TRITON_INTERPRET=1 in
the environment before Triton is imported the kernels run on CPU tensors, slowly: that is how they are tested.
"""

import triton
import triton.language as tl
from torch import Tensor

from gtpo_megatron.policy.head.function import LARGEST_SHIFT, RunningStatistics

UPDATE_BLOCK = 4096
GRADIENT_BLOCK = 2048
_LARGEST_SHIFT: tl.constexpr = tl.constexpr(LARGEST_SHIFT)


@triton.jit
def _update_kernel(logits, targets, maximum, total, moment, target_logit, columns, BLOCK: tl.constexpr):
    """One program takes one row of a tile into its running statistics."""
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * columns
    highest = tl.load(maximum + row)
    mass = tl.load(total + row)
    weighted = tl.load(moment + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        values = tl.load(first + offsets, mask=inside, other=float("-inf"))
        new = tl.maximum(highest, tl.max(values, axis=0))
        shift = tl.maximum(highest - new, -_LARGEST_SHIFT)
        factor = tl.exp(shift)
        # Lanes beyond the row take no part: their exp(-inf) * -inf would be NaN.
        shifted = tl.where(inside, values - new, 0.0)
        exponentials = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = (weighted + mass * shift) * factor + tl.sum(exponentials * shifted, axis=0)
        mass = mass * factor + tl.sum(exponentials, axis=0)
        highest = new
    tl.store(maximum + row, highest)
    tl.store(total + row, mass)
    tl.store(moment + row, weighted)
    target = tl.load(targets + row)
    if (target >= 0) & (target < columns):
        tl.store(target_logit + row, tl.load(first + target))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    log_total,
    entropy,
    grad_logprobs,
    grad_entropy,
    result,
    columns,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program turns BLOCK logits of one row into their gradient."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(logits + row * columns + offsets, mask=inside, other=0.0)
    slope = tl.load(grad_logprobs + row)
    logprobs = values - tl.load(log_total + row)
    probabilities = tl.exp(logprobs)
    gradient = -slope * probabilities
    if ENTROPY_GRAD:
        gradient -= tl.load(grad_entropy + row) * probabilities * (logprobs + tl.load(entropy + row))
    gradient += tl.where(offsets == tl.load(targets + row), slope, 0.0)
    tl.store(result + row * columns + offsets, gradient.to(result.dtype.element_ty), mask=inside)


class TritonOperations:
    """`TileOperations` by kernels."""

    def update(self, logits: Tensor, targets: Tensor, running: RunningStatistics, scratch: Tensor) -> None:
        rows, columns = logits.shape
        _update_kernel[(rows,)](
            logits,
            targets,
            running.maximum,
            running.total,
            running.moment,
            running.target,
            columns,
            BLOCK=min(UPDATE_BLOCK, triton.next_power_of_2(columns)),
        )

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
        rows, columns = logits.shape
        block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
        _gradient_kernel[(rows, triton.cdiv(columns, block))](
            logits,
            targets,
            log_total,
            entropy,
            grad_logprobs.contiguous(),
            entropy if grad_entropy is None else grad_entropy.contiguous(),
            scratch,
            columns,
            ENTROPY_GRAD=grad_entropy is not None,
            BLOCK=block,
        )
        return scratch


OPERATIONS = TritonOperations()
