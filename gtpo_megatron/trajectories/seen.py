"""What training saw of a step's completions: a Parquet file beside the batch, written after the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import list_array, write_whole

SCHEMA_VERSION = "1"
_VERSION_KEY = b"gtpo_megatron.seen"
_NUMBERS = ("entropy", "gate", "coefficient", "gap", "gap_max")
_TOKENS = ("logprobs", "entropies")


@dataclass(frozen=True, eq=False)
class Seen:
    """N completions as the step's last pass saw them, in the order of the batch. What was not asked for is None."""

    entropy: NDArray[np.float32]  # [N] mean of the tokens' entropies, nats
    coefficient: NDArray[
        np.float32
    ]  # [N] what the objective, which is maximised, has before its sum over tokens
    gap: NDArray[np.float32]  # [N] |trainer - sampler| log-probability, mean of tokens
    gap_max: NDArray[np.float32]  # [N] the largest
    gate: NDArray[np.float32] | None = None  # [N]; GTPO alone has one
    logprobs: Sequence[NDArray[np.float32]] | None = None  # N of [L], of the trainer, nats
    entropies: Sequence[NDArray[np.float32]] | None = None  # N of [L], nats, rounded to bf16

    def __len__(self) -> int:
        return len(self.entropy)


def seen_path(directory: Path, step: int) -> Path:
    """The file of a step in the folder of a run's trajectories."""
    return directory / f"seen-{step:08d}.parquet"


def write_seen(directory: Path, step: int, trajectories: Sequence[Trajectory], seen: Seen) -> Path:
    """Write it beside the step's batch, whole or not at all; the batch itself is never touched.

    Raises:
        ValueError: it is not of these trajectories.
        OSError: the file cannot be written.
    """
    if len(seen) != len(trajectories):
        raise ValueError(f"seen has {len(seen)} completions, the batch {len(trajectories)}")
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(t, name) for t in trajectories], pa.int32())
        for name in ("step", "group", "index")
    }
    for name in _NUMBERS:
        if (values := getattr(seen, name)) is not None:
            columns[name] = pa.array(values, pa.float32())
    for name in _TOKENS:
        if (lists := getattr(seen, name)) is not None:
            if [len(values) for values in lists] != [t.length for t in trajectories]:
                raise ValueError(f"{name}: other lengths than the batch has")
            columns[name] = list_array(list(lists), pa.float32(), np.float32)
    table = pa.table(columns).replace_schema_metadata({_VERSION_KEY: SCHEMA_VERSION.encode()})
    sink = pa.BufferOutputStream()
    split = [f"{name}.list.element" for name in _TOKENS if name in columns]
    # of numbers rounded to bf16 the two empty bytes of each then take no room
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, use_byte_stream_split=split)
    path = seen_path(directory, step)
    write_whole(path, sink.getvalue())
    return path


def read_seen(directory: Path, step: int) -> Seen | None:
    """What training saw of a step; None if no such file was written.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    path = seen_path(directory, step)
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or cut short: {str(error).splitlines()[0]}; remove it") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}, but this program reads version {SCHEMA_VERSION}; remove it"
        )
    numbers = {name: table[name].to_numpy() for name in _NUMBERS if name in table.column_names}
    tokens = {name: _lists(table[name]) for name in _TOKENS if name in table.column_names}
    return Seen(**numbers, **tokens)


def _lists(column: pa.ChunkedArray) -> list[NDArray[np.float32]]:
    return [chunk[row].values.to_numpy() for chunk in column.chunks for row in range(len(chunk))]
