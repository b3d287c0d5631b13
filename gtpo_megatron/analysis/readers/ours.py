"""Runs of this project: a run's directory, its trajectories folder, or files of it."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gtpo_megatron.analysis.dump import Completions
from gtpo_megatron.analysis.readers.files import parquet_columns, parquet_table
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.seen import Seen, read_seen
from gtpo_megatron.trajectories.store import SCHEMA_VERSION

_STEP = re.compile(r"step-(\d{8,})\.parquet")
FORMAT = "gtpo-megatron"
LACKS = ()
_VERSION_KEY = b"gtpo_megatron.trajectories"
_COLUMNS = ["step", "group", "text", "reward", "advantage", "finish_reason", "prompt_ids", "token_ids"]
_COLUMNS += ["logprobs", "token_versions"]
_TERM = "reward/"


def recognise(path: Path) -> bool:
    """Whether the file is a step of a trajectory store."""
    found = parquet_columns(path)
    return found is not None and _VERSION_KEY in found[1]


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    names, metadata = parquet_columns(path)
    version = metadata.get(_VERSION_KEY, b"none").decode()
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {version}, but this program reads version {SCHEMA_VERSION}")
    table = parquet_table(path, [*_COLUMNS, *(name for name in names if name.startswith(_TERM))])
    steps = table["step"].to_numpy()
    for step in np.unique(steps):
        yield _completions(path, int(step), np.flatnonzero(steps == step), table)


def _completions(path: Path, step: int, rows: NDArray[np.int64], table: pa.Table) -> Completions:
    if len(rows) != table.num_rows:
        table = table.take(pa.array(rows))
    tokens, offsets = _lists(table["token_ids"])
    logprobs, ends = _lists(table["logprobs"])
    versions, version_ends = _lists(table["token_versions"])
    lengths = np.diff(offsets)
    if not (np.array_equal(np.diff(ends), lengths) and np.array_equal(np.diff(version_ends), lengths)):
        raise UserError(f"{path}: token_ids, logprobs and token_versions of a row differ in length")
    prompt_ids, prompt_ends = _lists(table["prompt_ids"])
    return Completions(
        step=step,
        source=path,
        rows=rows,
        groups=table["group"].to_numpy().astype(np.int64),
        token_ids=tokens,
        offsets=offsets,
        rewards=table["reward"].to_numpy(),
        advantages=table["advantage"].to_numpy(),
        texts=table["text"].to_pylist(),
        prompt_ids=np.split(prompt_ids, prompt_ends[1:-1]),
        logprobs=logprobs,
        truncated=table["finish_reason"].to_numpy() == "length",
        staleness=step - _means(versions, offsets),
        terms={
            name.removeprefix(_TERM): table[name].to_numpy().astype(np.float64)
            for name in table.column_names
            if name.startswith(_TERM)
        },
        **_seen(path, step, lengths),
    )


def _seen(path: Path, step: int, lengths: NDArray[np.int64]) -> dict[str, NDArray]:
    """What training saw of a step, where it was written; nothing where that is of another batch than this file."""
    seen = read_seen(path.parent, step)
    if seen is None or len(seen) != len(lengths):
        return {}
    known = {"mean_entropies": seen.entropy, "coefficients": seen.coefficient, "gates": seen.gate}
    columns = {name: values.astype(np.float64) for name, values in known.items() if values is not None}
    for name, lists in (("trainer_logprobs", seen.logprobs), ("entropies", seen.entropies)):
        if lists is not None:
            if not np.array_equal([len(values) for values in lists], lengths):
                return {}
            columns[name] = np.concatenate([np.zeros(0, np.float32), *lists])
    return columns


def lacks(path: Path) -> tuple[str, ...]:
    """What was not recorded beside a file's batch."""
    match = _STEP.search(path.name)
    seen: Seen | None = read_seen(path.parent, int(match[1])) if match else None
    if seen is None:
        return (
            "what training saw of the completions: gate, coefficients, its log-probabilities and entropies",
        )
    return tuple(
        f"{what}: logging.seen {level} records them"
        for what, level, values in (
            ("the trainer's log-probabilities", "logprobs", seen.logprobs),
            ("entropies of the tokens", "entropies", seen.entropies),
        )
        if values is None
    )


def _lists(column: pa.ChunkedArray) -> tuple[NDArray, NDArray[np.int64]]:
    """A list column as its values and offsets from 0."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of a table without rows
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.flatten().to_numpy(), np.asarray(array.offsets) - (
        array.offsets[0].as_py() if len(array) else 0
    )


def _means(values: NDArray, offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(sums[offsets]) / np.maximum(np.diff(offsets), 1)


def files_of(directory: Path) -> Sequence[Path]:
    """Trajectory files of a run's directory or of its trajectories folder, in order of their steps."""
    return sorted(directory.glob("step-*.parquet")) or sorted(directory.glob("trajectories/step-*.parquet"))
