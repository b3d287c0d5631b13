"""Raw rows of a data set, numbered from 1, from a hub name, a local file or a folder."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gtpo_megatron.config import DataConfig
from gtpo_megatron.errors import UserError

_LOADERS = {".json": "json", ".parquet": "parquet"}


def resolve_source(config: DataConfig) -> Path | None:
    """The local file or folder that `data.path` names, or None for a hub name.

    A folder that holds `<split>.jsonl`, `.json` or `.parquet` gives that file.

    Raises:
        UserError: the path looks local and is not there, or its kind is unknown.
    """
    path = Path(config.path).expanduser()
    if path.is_file():
        if path.suffix not in (".jsonl", *_LOADERS):
            raise UserError(f"data.path: {path}: a data file must end in .jsonl, .json or .parquet")
        return path
    if path.is_dir():
        candidates = [path / f"{config.split}{suffix}" for suffix in (".jsonl", *_LOADERS)]
        return next((file for file in candidates if file.is_file()), path)
    if (
        path.is_absolute()
        or path.suffix in (".jsonl", *_LOADERS)
        or config.path.startswith(("./", "../", "~"))
    ):
        raise UserError(f"data.path: {config.path}: no such file or folder")
    return None


def read_rows(config: DataConfig) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (row number, row); the row is None where a line of a JSONL file is not a JSON object.

    JSON lines are read here and not by `datasets`, which cannot say which line is broken and refuses a column whose
    type changes from row to row. Blank lines are not rows, but they count as lines.

    Raises:
        UserError: the source cannot be opened or read.
    """
    source = resolve_source(config)
    rows = _jsonl_rows(source) if source and source.suffix == ".jsonl" else _dataset_rows(config, source)
    return islice(rows, config.limit)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the latter: lists in lists in lists
                row = None
            yield number, row if isinstance(row, dict) else None


def _dataset_rows(config: DataConfig, source: Path | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets  # seconds to import, and JSON lines do without it

    try:
        if source is not None and source.is_file():
            loader = _LOADERS[source.suffix]
            rows = datasets.load_dataset(loader, data_files={"rows": str(source)}, split="rows")
        else:
            rows = datasets.load_dataset(str(source or config.path), config.name, split=config.split)
    except Exception as error:  # a library boundary: every kind of reading failure comes out here
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(
            f"data.path: {source or config.path} (name {config.name}, split {config.split}) cannot be read: {reason}. "
            "Give a hub name, a .jsonl, .json or .parquet file, or a folder that holds <split>.jsonl or .parquet"
        ) from error
    return enumerate(rows, start=1)
