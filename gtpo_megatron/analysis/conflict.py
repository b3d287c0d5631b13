"""What GTPO makes of completions: advantages, conflict runs, and which tokens stand in them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gtpo_megatron.algorithm import conflict_runs, group_advantages
from gtpo_megatron.analysis.dump import Completions

_BLOCK_TOKENS = 1 << 22  # of a padded block of whole groups


@dataclass(frozen=True, eq=False)
class Examined:
    """Completions with token ids, and GTPO's view of them; all [N] but the mask."""

    batch: Completions
    lengths: NDArray[np.int64]
    advantages: NDArray[np.float64]
    scaled: NDArray[np.float64]  # advantages over the standard deviation of their group, as GRPO has them
    prefix: NDArray[np.int64]
    suffix: NDArray[np.int64]
    in_conflict: NDArray[np.bool_]  # [T]

    @property
    def conflict_tokens(self) -> NDArray[np.int64]:
        """Conflict tokens of each completion: [N]; a token in both runs counts once."""
        return np.minimum(self.lengths, self.prefix + self.suffix)


def examine(batch: Completions) -> Examined:
    """Advantages (the dump's own, or from its rewards), conflict runs and conflict tokens, by the definitions of `algorithm`.

    Args:
        batch: completions with token ids.
    """
    lengths = np.diff(batch.offsets)
    advantages, scaled = batch.advantages, batch.advantages
    if batch.rewards is not None:
        rewards, groups = torch.from_numpy(batch.rewards.copy()), torch.from_numpy(batch.groups.copy())
        scaled = group_advantages(rewards, groups, "std").numpy()
        advantages = group_advantages(rewards, groups).numpy() if advantages is None else advantages
    prefix, suffix = np.zeros(len(batch), np.int64), np.zeros(len(batch), np.int64)
    for rows in _blocks(batch.groups, lengths):
        prefix[rows], suffix[rows] = _runs(batch, rows, lengths[rows], advantages[rows])
    position = np.arange(len(batch.token_ids)) - np.repeat(batch.offsets[:-1], lengths)
    in_conflict = position < np.repeat(prefix, lengths)
    in_conflict |= position >= np.repeat(lengths - suffix, lengths)
    return Examined(batch, lengths, advantages, scaled, prefix, suffix, in_conflict)


def _blocks(groups: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of completions that have tokens, in blocks of whole groups of bounded padded size."""
    order = np.argsort(groups, kind="stable")
    order = order[lengths[order] > 0]
    ends = np.append(np.flatnonzero(np.diff(groups[order])) + 1, len(order))
    start = end = width = 0
    for stop in ends:
        longest = int(lengths[order[end:stop]].max(initial=0))
        if end > start and (stop - start) * max(width, longest) > _BLOCK_TOKENS:
            yield order[start:end]
            start, width = end, 0
        end, width = stop, max(width, longest)
    if end > start:
        yield order[start:end]


def _runs(
    batch: Completions, rows: NDArray[np.int64], lengths: NDArray[np.int64], advantages: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    padded = np.zeros((len(rows), int(lengths.max())), np.int32)
    for line, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        padded[line, :length] = batch.token_ids[batch.offsets[row] : batch.offsets[row] + length]
    prefix, suffix = conflict_runs(
        torch.from_numpy(padded),
        torch.from_numpy(lengths),
        torch.from_numpy(advantages),
        torch.from_numpy(batch.groups[rows]),
    )
    return prefix.numpy(), suffix.numpy()
