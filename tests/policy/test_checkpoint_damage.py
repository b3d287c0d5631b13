"""Damage of every file, one at a time, a full disk, and hostile files: never a wrong model, and nothing executed."""

import contextlib
import json
import logging
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gtpo_megatron.errors import UserError
from tests.policy import training


def save_two(config: Any) -> None:
    policy, optimizer, checkpointer = training.start(config)
    for step in (1, 2):
        training.steps(config, policy, optimizer, range(step - 1, step))
        checkpointer.save(training.state(step))


@pytest.fixture(scope="module")
def saved(ranks: Any, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with two checkpoints, of steps 1 and 2."""
    config = training.run_config(tmp_path_factory.mktemp("saved"), tiny_checkpoint("llama"))
    ranks.run(1, save_two, config)
    return config


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip_a_bit, Path.unlink)


def load_after_each_damage(config: Any) -> list[tuple[str, str, str, int, bool]]:
    """For every file and damage of the newest checkpoint: the error, and what `previous` loads with which warning."""
    policy, optimizer, strict = training.start(config)
    lenient = training.checkpointer(
        config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update={"on_corrupt": "previous"})}
        ),
        policy,
        optimizer,
    )
    newest = config.path / "checkpoints" / "step-000002"
    reports = []
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for damage in DAMAGES:
            damage(path)
            message = ""
            try:
                strict.load_latest()
            except UserError as error:
                message = str(error)
            with warnings_of("gtpo_megatron.policy.checkpoint.checkpointer") as warned:
                state = lenient.load_latest()
            name = path.relative_to(newest).as_posix()
            reports.append((name, damage.__name__, message, state.step, any(str(path) in w for w in warned)))
            path.write_bytes(whole)
    assert strict.load_latest() == training.state(2)  # every file is as it was
    return reports


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """The texts of the warnings that a logger gives."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger(name).removeHandler(handler)


def copy_of(saved: Any, directory: Path, **checkpoint: Any) -> Any:
    """The saved run, copied so that it may be damaged."""
    shutil.copytree(saved.path, directory / saved.name, symlinks=True)
    return saved.model_copy(
        update={"dir": str(directory), "checkpoint": saved.checkpoint.model_copy(update=checkpoint)}
    )


def test_every_damage_is_named_or_stepped_over(ranks: Any, saved: Any, tmp_path: Path) -> None:
    (reports,) = ranks.run(1, load_after_each_damage, copy_of(saved, tmp_path, on_corrupt="error"))
    names = {name for name, *_ in reports}
    assert {
        "manifest.json",
        "state.json",
        "rng.safetensors",
        "weights/.metadata",
        "weights/__0_0.distcp",
    } <= names
    for name, damage, message, step, warned in reports:
        assert name in message, (name, damage)
        assert step == 1, (name, damage)
        assert warned, (name, damage)


def load(config: Any) -> str:
    try:
        state = training.start(config)[2].load_latest()
    except UserError as error:
        return str(error)
    return f"step {state.step}"


def test_nothing_but_damage_is_an_error_and_not_a_new_run(ranks: Any, saved: Any, tmp_path: Path) -> None:
    config = copy_of(saved, tmp_path)
    for path in (config.path / "checkpoints").glob("step-*/state.json"):
        truncate(path)
    (answer,) = ranks.run(1, load, config)
    assert "none of the 2 checkpoints is whole" in answer


def test_damage_seen_by_one_rank_stops_all(ranks: Any, saved: Any, tmp_path: Path) -> None:
    config = copy_of(saved, tmp_path, on_corrupt="error")
    flip_a_bit(config.path / "checkpoints" / "step-000002" / "versions.json")
    answers = ranks.run(2, load, config)
    assert all("versions.json" in answer for answer in answers)


def test_a_checkpoint_of_another_model_is_refused(
    ranks: Any, saved: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    config = copy_of(saved, tmp_path)
    other = config.model.model_copy(update={"path": str(tiny_checkpoint("qwen3"))})
    (answer,) = ranks.run(1, load, config.model_copy(update={"model": other}))
    assert "of another model" in answer or "does not fit" in answer


class CreatesAFile:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def hostile_metadata(weights: Path, attack: CreatesAFile) -> None:
    (weights / ".metadata").write_bytes(pickle.dumps(attack))


def hostile_common_state(weights: Path, attack: CreatesAFile) -> None:
    torch.save(attack, weights / "common.pt")


def hostile_shard(weights: Path, attack: CreatesAFile) -> None:
    """Every tensor is the attack."""
    from gtpo_megatron.policy.checkpoint.safety import read_metadata

    torch.save(attack, weights / "__0_0.distcp")
    metadata = read_metadata(weights)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (weights / "__0_0.distcp").stat().st_size
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("write", [hostile_metadata, hostile_common_state, hostile_shard])
def test_a_hostile_file_is_not_executed(
    ranks: Any, saved: Any, tmp_path: Path, write: Callable[[Path, CreatesAFile], None]
) -> None:
    """Also when its author made the manifest agree with it."""
    config = copy_of(saved, tmp_path, on_corrupt="error")
    victim = tmp_path / "made-by-the-pickle"
    checkpoint = config.path / "checkpoints" / "step-000002"
    write(checkpoint / "weights", CreatesAFile(victim))
    forge_manifest(checkpoint)
    (answer,) = ranks.run(1, load, config)
    assert not victim.exists()
    assert "refused" in answer


def test_metadata_may_not_point_outside_the_checkpoint(saved: Any, tmp_path: Path) -> None:
    from gtpo_megatron.policy.checkpoint.safety import read_metadata

    weights = copy_of(saved, tmp_path).path / "checkpoints" / "step-000002" / "weights"
    metadata = read_metadata(weights)
    for info in metadata.storage_data.values():
        info.relative_path = "../../../secret"
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="points outside the checkpoint"):
        read_metadata(weights)


def forge_manifest(checkpoint: Path) -> None:
    from gtpo_megatron.policy.checkpoint import files

    (checkpoint / files.MANIFEST).unlink()
    files.write_manifest(checkpoint, 2, files.describe_and_flush(checkpoint, files.files_below(checkpoint)))


def save_with_no_room(config: Any, limit: int | None) -> tuple[str, list[str]]:
    """Save a third checkpoint when files may have `limit` bytes, or (None) when no disk space is left."""
    policy, optimizer, checkpointer = training.start(config)
    checkpointer.load_latest()
    free = shutil.disk_usage
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if limit is None:
            shutil.disk_usage = lambda path: free(path)._replace(free=1 << 20)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        message = ""
        try:
            checkpointer.save(training.state(3))
        except UserError as error:
            message = str(error)
    finally:
        shutil.disk_usage = free
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert checkpointer.load_latest() == training.state(2)
    return message, sorted(p.name for p in (config.path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, "MiB are free"), (100_000, "could not be written"), (2_000, "")]
)
def test_a_full_disk_leaves_the_earlier_checkpoints(
    ranks: Any, saved: Any, tmp_path: Path, limit: int | None, expected: str
) -> None:
    config = copy_of(saved, tmp_path)
    answers = ranks.run(2, save_with_no_room, config, limit)
    for message, names in answers:
        assert message and expected in message
        assert names == ["latest", "step-000001", "step-000002"]


def test_a_killed_save_is_no_checkpoint(ranks: Any, saved: Any, tmp_path: Path) -> None:
    config = copy_of(saved, tmp_path)
    checkpoints = config.path / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / ".step-000003.partial-0123abcd")
    (checkpoints / ".step-000003.partial-0123abcd" / "manifest.json").unlink()
    assert ranks.run(1, load, config) == ["step 2"]


def test_manifest_lists_every_file(saved: Any) -> None:
    checkpoint = saved.path / "checkpoints" / "step-000002"
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    found = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert listed.keys() | {"manifest.json"} == found
