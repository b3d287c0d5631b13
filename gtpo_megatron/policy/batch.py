"""Packed micro-batches: completions laid end to end (THD), this context-parallel rank's share of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from gtpo_megatron.policy.layers.local import zigzag_order
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import Row


@dataclass(frozen=True)
class MicroBatch:
    """One packed row on one rank. T: local tokens; R: local response tokens; N: completions; L: longest completion."""

    indices: tuple[int, ...]  # [N] places of the completions in the whole batch
    tokens: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sequence
    packed: PackedSeqParams
    rows: Tensor  # [R] int64: the position in [0, T) whose hidden state predicts the token
    targets: Tensor  # [R] int64: the token
    completion: Tensor  # [R] int64 in [0, N)
    offset: Tensor  # [R] int64: place of the token in its completion
    sampled_logprobs: Tensor  # [R] float32
    lengths: Tensor  # [N] int64, whole completions (all context-parallel ranks)
    max_length: int  # L
    old_logprobs: Tensor | None = None  # [R] of the policy before this batch's updates; last stage only
    reference_logprobs: Tensor | None = None  # [R] of a frozen reference policy; last stage only

    def padded(self, values: Tensor) -> Tensor:
        """[R] -> [N, L], zero where this rank holds no token. Differentiable."""
        grid = values.new_zeros(len(self.indices), self.max_length)
        return grid.index_put((self.completion, self.offset), values)

    def per_completion(self, values: Tensor) -> Tensor:
        """[R] -> [N]: sums over this rank's tokens of each completion."""
        return values.new_zeros(len(self.indices)).index_add(0, self.completion, values)


def make_micro_batch(
    trajectories: Sequence[Trajectory] | Mapping[int, Row],
    indices: Sequence[int],
    *,
    alignment: int = 1,
    context_size: int = 1,
    context_rank: int = 0,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pack the completions at `indices` with their prompts.

    An empty `indices` gives a row of padding without response tokens: a data-parallel rank with nothing to do still
    takes part in the collectives.
    """
    tokens, positions, rows, targets, completion, offset, sampled, bounds = [], [], [], [], [], [], [], [0]
    for place, index in enumerate(indices):
        trajectory = trajectories[index]
        ids = np.concatenate([trajectory.prompt_ids, trajectory.token_ids]).astype(np.int64)
        start, padded = bounds[-1] // context_size, -(-len(ids) // alignment) * alignment
        local = _local_positions(padded, context_size, context_rank)
        tokens.append(np.pad(ids, (0, padded - len(ids)), constant_values=pad_id)[local])
        positions.append(local)
        predicted = (
            local + 1 - len(trajectory.prompt_ids)
        )  # place in the completion of the token predicted here
        here = np.flatnonzero((predicted >= 0) & (predicted < trajectory.length))
        rows.append(start + here)
        offset.append(predicted[here])
        targets.append(trajectory.token_ids[predicted[here]].astype(np.int64))
        sampled.append(trajectory.logprobs[predicted[here]])
        completion.append(np.full(len(here), place))
        bounds.append(bounds[-1] + padded)
    if not indices:
        padding = _local_positions(alignment, context_size, context_rank)
        tokens, positions, bounds = [np.full(len(padding), pad_id)], [padding], [0, alignment]
    cumulative = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(np.diff(bounds))
    lengths = [trajectories[i].length for i in indices]

    def join(parts: list[np.ndarray], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0), dtype=dtype, device=device)

    return MicroBatch(
        indices=tuple(indices),
        tokens=join(tokens)[None],
        position_ids=join(positions)[None],
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            max_seqlen_q=int(longest),
            max_seqlen_kv=int(longest),
        ),
        rows=join(rows),
        targets=join(targets),
        completion=join(completion),
        offset=join(offset),
        sampled_logprobs=join(sampled, torch.float32),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        max_length=max(lengths, default=0),
    )


def _local_positions(length: int, context_size: int, context_rank: int) -> np.ndarray:
    """Positions of one padded sequence that this context-parallel rank holds, in its order."""
    if context_size == 1:
        return np.arange(length)
    share = length // context_size
    return zigzag_order(length, context_size).numpy()[context_rank * share : (context_rank + 1) * share]
