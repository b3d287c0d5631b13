"""What a reader makes of a rollout dump: completions in columns, a step (or part of one) at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError


@dataclass(frozen=True, eq=False)
class Completions:
    """N completions of one step in columns. What a dump does not say is None, never a made-up value.

    Tokens of all completions stand behind each other; completion i is `token_ids[offsets[i]:offsets[i + 1]]`. Groups are
    whole: no completion of another object of the same step belongs to one of them.
    """

    step: int
    source: Path
    rows: NDArray[np.int64]  # [N] rows (Parquet, from 0) or lines (JSONL, from 1) in the source
    groups: NDArray[np.int64]  # [N]
    token_ids: NDArray[np.int32] | None  # [T]; None: texts alone
    offsets: NDArray[np.int64] | None  # [N + 1]
    rewards: NDArray[np.float64] | None  # [N]
    advantages: NDArray[np.float64] | None = None  # [N]; None: to be computed from the rewards
    texts: Sequence[str] | None = None  # [N]
    prompts: Sequence[str] | None = None  # [N]
    prompt_ids: Sequence[NDArray[np.int32]] | None = None  # [N]
    logprobs: NDArray[np.float32] | None = None  # [T] of the sampler, nats
    entropies: NDArray[np.float32] | None = None  # [T] of the trained policy, nats
    trainer_logprobs: NDArray[np.float32] | None = None  # [T] of the trained policy, nats
    mean_entropies: NDArray[np.float64] | None = None  # [N] as training measured them, nats
    gates: NDArray[np.float64] | None = None  # [N] 1 or 0: whether training's entropy filter let it pass
    coefficients: NDArray[np.float64] | None = (
        None  # [N] what training's objective had before its sum over tokens
    )
    truncated: NDArray[np.bool_] | None = None  # [N] ended by the length limit
    staleness: NDArray[np.float64] | None = (
        None  # [N] steps between the weights that sampled and the step, mean of tokens
    )
    terms: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # [N] each, NaN where missing

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unit(self) -> str:
        """What a row of the source is called."""
        return "row" if self.source.suffix == ".parquet" else "line"


@dataclass(frozen=True)
class Dump:
    """A recognised dump: its format, where it lies, and what its format cannot tell."""

    format: str
    paths: tuple[Path, ...]
    batches: Iterator[Completions]
    lacks: tuple[str, ...] = ()  # sentences
    tokenizer: str | None = None  # folder that the dump itself names
    initial_entropy: float | None = None  # nats, where the dump says it
    step_metrics: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # of a run of ours


def flat(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Token lists behind each other, and their offsets [N + 1]."""
    offsets = np.cumsum([0, *(len(tokens) for tokens in lists)], dtype=np.int64)
    tokens = np.fromiter((token for tokens in lists for token in tokens), np.int32, int(offsets[-1]))
    return tokens, offsets


def group_numbers(keys: Sequence[Any]) -> NDArray[np.int64]:
    """Numbers of groups in order of appearance, equal for equal keys: [N]."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def number(value: Any, source: Path, place: str, name: str) -> float:
    """A finite number of a dump.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, int | float) and np.isfinite(value):
        return float(value)
    raise UserError(f"{source}, {place}: {name} is {value!r}, not a finite number")
