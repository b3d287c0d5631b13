"""Looking into a file: JSON lines and Parquet, with errors that name the file and the row."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtpo_megatron.errors import UserError

Line = tuple[int, dict[str, Any]]  # number, from 1, and the object on it


def first_line(path: Path) -> dict[str, Any] | None:
    """The first object of a JSON-lines file; None if the file does not begin with one."""
    try:
        with path.open(encoding="utf-8") as file:
            line = next((line for line in file if line.strip()), "")
        value = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_lines(path: Path) -> Iterator[Line]:
    """All objects of a JSON-lines file with their line numbers; empty lines are passed over.

    Raises:
        UserError: a line is no JSON object (the file may be cut short), or not UTF-8.
    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number + 1}: not UTF-8: {error.reason}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith("\n") else "; the file ends there, so it is probably cut short"
        raise UserError(f"{path}, line {number}: not valid JSON ({error}){cut}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: a {type(value).__name__}, where an object is expected")
    return value


def need(path: Path, line: Line, key: str, kind: type | tuple[type, ...]) -> Any:
    """A key of a line's object, of the given type.

    Raises:
        UserError: it is missing or of another type.
    """
    value = line[1].get(key)
    if not isinstance(value, kind):
        found = "missing" if key not in line[1] else f"a {type(value).__name__}"
        raise UserError(f"{path}, line {line[0]}: {key} is {found}; this format has one on every line")
    return value


def token_list(path: Path, line: Line, key: str) -> list[int]:
    """A key of a line's object that is a list of token ids.

    Raises:
        UserError: it is missing or no such list.
    """
    tokens = need(path, line, key, list)
    for position, token in enumerate(tokens):
        if not isinstance(token, int) or not 0 <= token < 2**31:
            raise UserError(
                f"{path}, line {line[0]}: {key}[{position}] is {str(token)[:40]!r}, not a token id (0 to 2^31 - 1)"
            )
    return tokens


def parquet_columns(path: Path) -> tuple[list[str], dict[bytes, bytes]] | None:
    """Column names and metadata of a Parquet file; None if it is none.

    Raises:
        UserError: it begins as one, but is damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                return None
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from error
    return schema.names, schema.metadata or {}


def parquet_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The whole table, or some columns of it.

    Raises:
        UserError: the file is damaged or cut short.
    """
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read, it is damaged or cut short: {str(error).splitlines()[0]}"


def step_of(path: Path, pattern: str) -> int:
    """The step that a file's path names by the pattern's first group; 0 if it names none."""
    found = re.findall(pattern, path.as_posix())
    return int(found[-1]) if found else 0
