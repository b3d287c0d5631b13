"""Which framework wrote a dump: decided by what the files hold, never by their names."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from gtpo_megatron.analysis.dump import Completions, Dump
from gtpo_megatron.analysis.readers import nemo_rl, open_instruct, ours, prime_rl, slime, trl, verl
from gtpo_megatron.config.loading import read_recorded
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import read_metrics

READERS: tuple[ModuleType, ...] = (ours, trl, prime_rl, open_instruct, nemo_rl, verl, slime)
_SUFFIXES = (".parquet", ".jsonl", ".pt")


def open_dump(paths: Sequence[Path], trust: bool = False) -> Dump:
    """Recognise files or directories as one dump. Nothing but the beginnings of the files is read before its batches are.

    Args:
        paths: files of one dump, or directories of them (a run's own, too).
        trust: load pickles (slime).

    Raises:
        UserError: nothing there is known, files are of several formats or damaged, or a pickle is not trusted.
    """
    files = [(file, path) for path in paths for file in _files(path)]
    found: dict[Path, ModuleType] = {}
    for file, path in files:
        reader = next((reader for reader in READERS if reader.recognise(file)), None)
        if reader is None and not path.is_dir():
            raise UserError(_unknown(file))
        if reader is not None:
            found[file] = reader
    if not found:
        raise UserError(_unknown(*paths))
    formats = sorted({reader.FORMAT for reader in found.values()})
    if len(formats) > 1:
        raise UserError(
            f"{', '.join(map(str, paths))}: files of several formats ({', '.join(formats)}); give one dump"
        )
    reader = next(iter(found.values()))
    if reader is slime and not trust:
        raise UserError(
            f"{next(iter(found))}: a pickle of slime; loading one can run any code. Add --trust if you trust whoever wrote it"
        )
    chosen = _of_training(list(found)) if reader is prime_rl else list(found)
    return Dump(
        format=reader.FORMAT,
        paths=tuple(chosen),
        batches=_batches(reader, chosen),
        lacks=ours.lacks(chosen[0]) if reader is ours else reader.LACKS,
        **(_of_our_run(chosen[0]) if reader is ours else {}),
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if file.suffix in _SUFFIXES and not file.name.startswith("."))
    return list(ours.files_of(path)) or sorted(files, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """step_9 before step_10."""
    parts = re.findall(r"\d+|\D+", path.as_posix())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _of_training(files: list[Path]) -> list[Path]:
    """prime-rl writes an episode up to twice: of what it trained on where that is there, else all; evaluations never."""
    for wanted in ("/train/effective/", "/train/all/"):
        if chosen := [file for file in files if wanted in file.as_posix()]:
            return chosen
    return files


def _batches(reader: ModuleType, files: list[Path]) -> Iterator[Completions]:
    for file in files:
        yield from (batch for batch in reader.read(file) if len(batch))


def _unknown(*paths: Path) -> str:
    names = ", ".join(reader.FORMAT for reader in READERS)
    return (
        f"{', '.join(map(str, paths))}: no rollout dump that is known here, or damaged in its first line. Known are: {names} "
        "(docs/analysis.md says which files)"
    )


def _of_our_run(file: Path) -> dict[str, object]:
    """What the run around a trajectory file says: its tokenizer, and the metrics of its steps."""
    run = file.parent.parent
    known: dict[str, object] = {}
    if (run / "config.yaml").is_file():
        model = read_recorded(run / "config.yaml", ["model.path"])["model"]
        places = [
            model.get("tokenizer") or model.get("path"),
            run / "hf",
        ]  # the run's own export holds one too
        known["tokenizer"] = next((str(place) for place in places if place and Path(place).is_dir()), None)
    if (run / "metrics.jsonl").is_file():
        rows = read_metrics(run / "metrics.jsonl")
        # A line of metrics counts finished steps; the batch that it was trained on is the one before.
        known["step_metrics"] = {row["step"] - 1: row for row in rows if "loss" in row}
        known["initial_entropy"] = next((r["entropy/initial"] for r in rows if "entropy/initial" in r), None)
    return known
