"""The durable store: one Parquet file per step, written whole or not at all, before the step is trained on."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.record import Trajectory

SCHEMA_VERSION = "1"
_VERSION_KEY = b"gtpo_megatron.trajectories"
_NOTES_KEY = b"gtpo_megatron.notes"
_STEP_KEY = b"gtpo_megatron.step"
_TERM = "reward/"  # a column per reward term, null where a trajectory has no such term
_FILE = re.compile(r"step-(\d{8,})\.parquet")

_SCALARS = {
    "step": pa.int32(),
    "group": pa.int32(),
    "index": pa.int32(),
    "prompt_id": pa.string(),
    "finish_reason": pa.string(),
    "text": pa.string(),
    "answer": pa.string(),
    "reward": pa.float64(),
    "reward_error": pa.string(),
    "advantage": pa.float64(),
    "prefix": pa.int32(),
    "suffix": pa.int32(),
    "seconds": pa.float64(),
}
_ARRAYS = {
    "prompt_ids": (pa.int32(), np.int32),
    "token_ids": (pa.int32(), np.int32),
    "logprobs": (pa.float32(), np.float32),
    "token_versions": (pa.int32(), np.int32),
}


class TrajectoryStore:
    """Trajectories of a run, by step. Any Parquet reader opens the files; columns are the fields of `Trajectory`.

    Args:
        directory: where the files lie; made at the first write.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._cleaned = False

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        return self._directory

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self._directory / f"step-{step:08d}.parquet"

    def steps(self) -> list[int]:
        """Steps that are stored, in order. Temporary files of a write that was cut short do not count."""
        if not self._directory.is_dir():
            return []
        return sorted(
            int(match[1]) for name in os.listdir(self._directory) if (match := _FILE.fullmatch(name))
        )

    def write(
        self, step: int, trajectories: Sequence[Trajectory], notes: Mapping[str, Any] | None = None
    ) -> Path:
        """Store a step's trajectories, replacing what was stored for it; durable when this returns.

        `notes` is any JSON-able mapping to be kept in the file's metadata; see `read_notes`.

        Raises:
            UserError: the file cannot be written (disk full, quota, no permission); nothing of it is left then.
        """
        path = self.path(step)
        content = _serialise(step, trajectories, notes or {})
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            write_whole(path, content)
        except OSError as error:
            raise UserError(
                f"{path}: the trajectories of step {step} cannot be written: {error.strerror}; {content.size / 2**20:.1f} MiB "
                f"needed, {_free_mib(self._directory):.1f} MiB free. Make room (or permit the write) and start the run "
                "again; it resumes"
            ) from error
        return path

    def read(self, step: int) -> list[Trajectory]:
        """The trajectories of a step, exactly as written.

        Raises:
            UserError: there is no such file, it is damaged, of another step, or another version wrote it.
        """
        path = self.path(step)
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise UserError(f"{path}: step {step} is not stored (stored: {_ranges(self.steps())})") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: cannot be read, it is damaged or cut short: {str(error).splitlines()[0]}. "
                "Remove it; resuming from a checkpoint before this step writes it again"
            ) from error
        version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {version}, but this program reads version {SCHEMA_VERSION}"
            )
        _check_step(path, step, table.schema.metadata, table["step"].unique().to_pylist())
        return _trajectories(table)

    def read_notes(self, step: int) -> dict[str, Any]:
        """The notes that were written with a step; reads no trajectories.

        Raises:
            UserError: the file is missing, damaged or of another step.
        """
        path = self.path(step)
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
        _check_step(path, step, metadata, [])
        return json.loads(metadata.get(_NOTES_KEY, b"{}"))

    def _remove_leftovers(self) -> None:
        # Only by a writer: a report that runs beside the training must not take its file away.
        if not self._cleaned:
            for kind in ("step", "seen"):
                for leftover in self._directory.glob(f".{kind}-*.parquet.tmp"):
                    leftover.unlink(missing_ok=True)
            self._cleaned = True


def write_whole(path: Path, content: pa.Buffer) -> None:
    """Write a file under another name, and rename it when it is on the disk; nothing is left of one that fails (OSError)."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _check_step(path: Path, step: int, metadata: Mapping[bytes, bytes] | None, rows: list[int]) -> None:
    """Raise UserError if a file is of another step than its name, by its metadata or (older files) its rows."""
    stated = (metadata or {}).get(_STEP_KEY)
    if others := (set(rows) if stated is None else {int(stated)}) - {step}:
        raise UserError(
            f"{path}: holds the trajectories of step {min(others)}, not of step {step}: it was copied or renamed. "
            "Remove it; resuming from a checkpoint before this step writes it again"
        )


def _serialise(step: int, trajectories: Sequence[Trajectory], notes: Mapping[str, Any]) -> pa.Buffer:
    columns: dict[str, pa.Array] = {}
    for name, kind in _SCALARS.items():
        columns[name] = pa.array([getattr(trajectory, name) for trajectory in trajectories], kind)
    for name, (kind, dtype) in _ARRAYS.items():
        columns[name] = list_array([getattr(trajectory, name) for trajectory in trajectories], kind, dtype)
    for term in sorted({term for trajectory in trajectories for term in trajectory.reward_terms}):
        values = [trajectory.reward_terms.get(term) for trajectory in trajectories]
        columns[f"{_TERM}{term}"] = pa.array(values, pa.float64())
    metadata = {_VERSION_KEY: SCHEMA_VERSION.encode(), _NOTES_KEY: json.dumps(notes).encode()}
    metadata[_STEP_KEY] = str(step).encode()
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def list_array(arrays: list[NDArray], kind: pa.DataType, dtype: type[np.generic]) -> pa.Array:
    """A column of lists."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
    values = np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, kind, from_pandas=False))


def _trajectories(table: pa.Table) -> list[Trajectory]:
    scalars = {name: table[name].to_pylist() for name in _SCALARS}
    arrays = {name: _split(table[name]) for name in _ARRAYS}
    terms = {
        name.removeprefix(_TERM): table[name].to_pylist()
        for name in table.column_names
        if name.startswith(_TERM)
    }
    return [
        Trajectory(
            **{name: values[row] for name, values in (scalars | arrays).items()},
            reward_terms={term: values[row] for term, values in terms.items() if values[row] is not None},
        )
        for row in range(table.num_rows)
    ]


def _split(column: pa.ChunkedArray) -> list[NDArray]:
    return [chunk[row].values.to_numpy() for chunk in column.chunks for row in range(len(chunk))]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_mib(directory: Path) -> float:
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free / 2**20


def _ranges(steps: list[int]) -> str:
    return f"{steps[0]} to {steps[-1]}, {len(steps)} steps" if steps else "none"
