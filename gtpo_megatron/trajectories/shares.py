"""What of a batch goes to which rank: a compact table of all completions to all, the rows of a replica to its ranks alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.trajectories.packing import PackingPlan
from gtpo_megatron.trajectories.record import Trajectory

_COLUMNS = np.dtype(
    [
        ("advantage", np.float32),
        ("prefix", np.int32),
        ("suffix", np.int32),
        ("length", np.int32),
        ("group", np.int32),
    ]
)


@dataclass(frozen=True, eq=False)
class BatchTable:
    """What the loss needs to know of every completion of the batch, whoever trains on it: 20 bytes each."""

    rows: NDArray[np.void]  # [completions], see _COLUMNS; the normalisers follow from group and runs

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "BatchTable":
        """Read it off the analysed trajectories."""
        entries = [(t.advantage, t.prefix, t.suffix, t.length, t.group) for t in trajectories]
        return cls(np.array(entries, _COLUMNS))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Generated tokens of the batch."""
        return int(self.rows["length"].sum(dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Row:
    """As much of a trajectory as a rank trains on."""

    prompt_ids: NDArray[np.int32]  # [P]
    token_ids: NDArray[np.int32]  # [L]
    logprobs: NDArray[np.float32]  # [L]

    @property
    def length(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Share:
    """One data-parallel replica's part of a batch: its micro-batches, and their rows end to end.

    Its size is 4 bytes a token, 4 more for each generated one's logprob, and 16 or so a row; no text travels.
    """

    micro_batches: tuple[tuple[int, ...], ...]  # places in the batch, by micro-batch in order of execution
    lengths: NDArray[np.int32]  # [2, rows]: of prompt and completion, in the micro-batches' order
    ids: NDArray[np.int32]  # prompt and completion of each row in turn
    logprobs: NDArray[np.float32]  # of the completions

    def rows(self) -> dict[int, Row]:
        """The rows by place in the batch."""
        places = [place for batch in self.micro_batches for place in batch]
        prompts, completions = self.lengths.astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(prompts + completions)])
        generated = np.concatenate([[0], np.cumsum(completions)])
        return {
            place: Row(
                self.ids[start : start + prompt], self.ids[start + prompt : end], self.logprobs[first:last]
            )
            for place, prompt, (start, end), (first, last) in zip(
                places, prompts, pairwise(starts), pairwise(generated), strict=True
            )
        }


def shares_of(trajectories: Sequence[Trajectory], plan: PackingPlan) -> list[Share]:
    """The share of each data-parallel replica under the plan, in order."""
    return [_share(trajectories, micro_batches) for micro_batches in plan.micro_batches]


def _share(trajectories: Sequence[Trajectory], micro_batches: tuple[tuple[int, ...], ...]) -> Share:
    rows = [trajectories[place] for batch in micro_batches for place in batch]
    ids = [part for row in rows for part in (row.prompt_ids, row.token_ids)]
    lengths = [[len(row.prompt_ids) for row in rows], [row.length for row in rows]]
    return Share(
        micro_batches,
        np.array(lengths, np.int32),
        np.concatenate([np.zeros(0, np.int32), *ids], dtype=np.int32),
        np.concatenate([np.zeros(0, np.float32), *(row.logprobs for row in rows)], dtype=np.float32),
    )
