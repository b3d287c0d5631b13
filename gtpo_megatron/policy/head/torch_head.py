"""Tile operations in PyTorch, for CPUs and any GPU: every pass over a tile works in place."""

import torch
from torch import Tensor

from gtpo_megatron.policy.head.function import LARGEST_SHIFT, RunningStatistics


class TorchOperations:
    """`TileOperations` by tensor expressions."""

    def update(self, logits: Tensor, targets: Tensor, running: RunningStatistics, scratch: Tensor) -> Tensor:
        column, inside = _target_columns(logits, targets)
        target = logits.gather(1, column).squeeze(1)
        running.target.copy_(torch.where(inside, target, running.target))

        maximum = torch.maximum(running.maximum, logits.amax(1))
        shift = (running.maximum - maximum).clamp(min=-LARGEST_SHIFT)
        factor = shift.exp()
        logits.sub_(maximum.unsqueeze(1))
        exponentials = torch.exp(logits, out=scratch if scratch.dtype == logits.dtype else None)
        tile_total = exponentials.sum(1)
        tile_moment = exponentials.mul_(logits).sum(1)
        running.moment.add_(running.total * shift).mul_(factor).add_(tile_moment)
        running.total.mul_(factor).add_(tile_total)
        running.maximum.copy_(maximum)
        return maximum

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
        logprobs = logits.sub_(log_total.unsqueeze(1))
        if grad_entropy is None:
            result = logprobs.exp_().mul_(-grad_logprobs.unsqueeze(1))
        else:
            probabilities = torch.exp(logprobs, out=scratch if scratch.dtype == logits.dtype else None)
            slope = logprobs.add_(entropy.unsqueeze(1)).mul_(-grad_entropy.unsqueeze(1))
            result = slope.sub_(grad_logprobs.unsqueeze(1)).mul_(probabilities)
        column, inside = _target_columns(logits, targets)
        result.scatter_add_(1, column, torch.where(inside, grad_logprobs, 0.0).unsqueeze(1))
        return result.to(scratch.dtype)


def _target_columns(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """([rows, 1] column of each target, cut to the tile; [rows] whether it lies in the tile)."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    return targets.clamp(0, logits.shape[1] - 1).unsqueeze(1), inside


OPERATIONS = TorchOperations()
