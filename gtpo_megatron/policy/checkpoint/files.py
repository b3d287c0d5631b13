"""A checkpoint as files: checksums, the completion marker, atomic publication, and which checkpoints are kept.

A checkpoint is written under a hidden name, every file is flushed to the disk, its manifest is written last, and only
then is it renamed to `step-000012`. A directory of that name without a manifest, or one that differs from its manifest
in a single bit, is damaged and never loaded.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from gtpo_megatron.errors import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_CHUNK = 1 << 22


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written: the message names the file and what is wrong with it."""


def step_name(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, damaged ones included, newest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def new_partial(directory: Path, step: int) -> Path:
    """Make the hidden directory that a checkpoint is written in; its name is never used twice.

    A writer that outlived its killed trainer can therefore not reach into the next attempt's files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{step_name(step)}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    return partial


def check_free_space(directory: Path, needed: int) -> None:
    """Raise UserError unless the file system of `directory` has `needed` bytes and a reserve of 5 % and 16 MiB."""
    while not directory.exists():
        directory = directory.parent
    free, wanted = shutil.disk_usage(directory).free, int(needed * 1.05) + (16 << 20)
    if free < wanted:
        raise UserError(
            f"{directory}: a checkpoint needs {wanted / 2**20:,.0f} MiB but only {free / 2**20:,.0f} MiB are free: nothing "
            "was written. Free some space, lower checkpoint.keep_last, or move the run (dir)"
        )


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, as hex digits. It finds accidents, not forgeries."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def files_below(directory: Path) -> list[str]:
    """Relative names of all files below a directory, largest first, so that ranks can share them out evenly."""
    sizes = [
        (p.stat().st_size, p.relative_to(directory).as_posix()) for p in directory.rglob("*") if p.is_file()
    ]
    return [name for _, name in sorted(sizes, reverse=True)]


def describe_and_flush(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of the named files, after their bytes are on the disk."""
    described = {}
    for name in names:
        path = directory / name
        _flush(path)
        described[name] = {"bytes": path.stat().st_size, "checksum": checksum(path)}
    return described


def write_manifest(directory: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the completion marker, after which all of the directory is on the disk."""
    content = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    (directory / MANIFEST).write_bytes(_encode(content))
    _flush(directory / MANIFEST)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        _flush(folder)


def publish(partial: Path, step: int) -> Path:
    """Give a checkpoint with its manifest its name, and let `latest` point at it."""
    final = partial.parent / step_name(step)
    if final.exists():  # a damaged one of this step, which a resumed run has trained past again
        discard(final)
    partial.rename(final)
    link = partial.parent / f".{LATEST}-{uuid.uuid4().hex[:8]}"
    link.symlink_to(final.name)
    latest = partial.parent / LATEST
    if (
        latest.is_dir() and not latest.is_symlink()
    ):  # a checkpoint twice: the run was copied with its links followed
        discard(latest)
    link.replace(latest)
    _flush(partial.parent)
    return final


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest's content. Raises DamagedCheckpointError."""
    path = checkpoint / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(
            f"{path}: the checkpoint has no completion marker ({error.strerror})"
        ) from error
    try:
        content = json.loads(raw)
        stated = content.pop("checksum")
        if _encode(content) != raw or content["format"] != FORMAT:
            raise ValueError(f"stated checksum {stated} or format is not its own")
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: the completion marker is damaged ({error})") from error


def verify_files(checkpoint: Path, files: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    """Compare the named files with the manifest's `files`. Raises DamagedCheckpointError for the first that differs."""
    for name in names:
        path, stated = checkpoint / name, files[name]
        if not path.is_file():
            raise DamagedCheckpointError(
                f"{path}: missing; the manifest lists it with {stated['bytes']} bytes"
            )
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise DamagedCheckpointError(f"{path}: {size} bytes, but {stated['bytes']} were written")
        if (found := checksum(path)) != stated["checksum"]:
            raise DamagedCheckpointError(f"{path}: checksum {found}, but {stated['checksum']} was written")


def prune(directory: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the last `keep_last` and those of every `keep_every`-th step, and all leftovers."""
    for path in list_checkpoints(directory)[keep_last:]:
        if not (keep_every and int(path.name.removeprefix("step-")) % keep_every == 0):
            discard(path)
    for path in directory.glob(".*"):  # partial checkpoints and half-removed ones of killed runs
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a directory so that no moment shows half of it under its name."""
    hidden = path.with_name(f".{path.name.lstrip('.')}.removed-{uuid.uuid4().hex[:8]}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _encode(content: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, with the checksum of the rest in it."""
    body = json.dumps(content, sort_keys=True)
    return (
        json.dumps(
            content | {"checksum": xxhash.xxh3_128_hexdigest(body.encode())}, sort_keys=True, indent=1
        ).encode()
        + b"\n"
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
