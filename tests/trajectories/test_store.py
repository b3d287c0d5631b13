"""The Parquet store: exact, atomic, readable by others, clear about what goes wrong."""

import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

ROOT = Path(__file__).parents[2]


def trajectory(length: int = 3, **fields) -> Trajectory:
    return Trajectory(
        **{
            "step": 1,
            "group": 0,
            "index": 0,
            "prompt_id": "7",
            "prompt_ids": np.arange(4, dtype=np.int32),
            "token_ids": np.arange(length, dtype=np.int32),
            "logprobs": np.linspace(-1, 0, length, dtype=np.float32),
            "token_versions": np.ones(length, np.int32),
            "finish_reason": "stop",
        }
        | fields
    )


def assert_same(a: Trajectory, b: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), field.name
        else:
            x, y = (sorted(v.items()) if isinstance(v, dict) else v for v in (x, y))
            assert repr(x) == repr(y), field.name  # of a float: exact, and NaN equals NaN


floats = st.floats(allow_nan=True, width=64)
trajectories = st.builds(
    lambda length, logprob, **fields: trajectory(
        length, logprobs=np.full(length, logprob, np.float32), **fields
    ),
    st.integers(0, 4),
    st.floats(width=32),
    group=st.integers(0, 3),
    prompt_id=st.text(st.characters(codec="utf-8"), max_size=3),
    text=st.text(st.characters(codec="utf-8"), max_size=5),
    finish_reason=st.sampled_from(["stop", "length", "abort", "data"]),
    reward=floats,
    advantage=floats,
    reward_terms=st.dictionaries(st.sampled_from(["a", "b/c", "ü"]), floats),
    reward_error=st.none() | st.text(st.characters(codec="utf-8"), max_size=3),
    prefix=st.integers(0, 9),
    suffix=st.integers(0, 9),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(trajectories, max_size=4))
def test_what_is_read_is_what_was_written(tmp_path: Path, written: list[Trajectory]) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    store.write(1, written)
    read = store.read(1)
    assert len(read) == len(written)
    for a, b in zip(read, written, strict=True):
        assert_same(a, b)


def test_steps_are_listed_in_order_and_may_be_replaced(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    assert store.steps() == []
    for step in (10, 2, 123_456_789):
        store.write(step, [trajectory(step=step)])
    store.write(2, [trajectory(length=5), trajectory(length=6)])
    assert store.steps() == [2, 10, 123_456_789]
    assert [t.length for t in store.read(2)] == [5, 6]


def test_other_programs_read_it(tmp_path: Path) -> None:
    path = TrajectoryStore(tmp_path).write(
        1, [trajectory(reward=2.0, reward_terms={"format": 1.0}), trajectory(length=0, index=1)]
    )
    frame = pandas.read_parquet(path)
    assert frame["reward"].tolist() == [2.0, 0.0]
    assert frame["seconds"].tolist() == [0.0, 0.0]  # where nobody took the time
    assert frame["reward/format"].isna().tolist() == [False, True]
    assert [len(ids) for ids in frame["token_ids"]] == [3, 0]


def test_leftovers_of_a_cut_write_are_ignored_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    TrajectoryStore(tmp_path).write(1, [trajectory()])
    leftover = tmp_path / ".step-00000002.parquet.tmp"
    leftover.write_bytes(b"half")
    store = TrajectoryStore(tmp_path)
    assert store.steps() == [1] and len(store.read(1)) == 1
    assert leftover.exists()  # a reader leaves a writer's file alone
    store.write(3, [trajectory()])
    assert not leftover.exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TrajectoryStore(tmp_path)
    store.write(1, [trajectory()])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    for step in (1, 2):
        with pytest.raises(
            UserError,
            match=rf"step-0000000{step}.parquet: .*No space left on device; 0.0 MiB needed, 3.0 MiB free",
        ):
            store.write(step, [trajectory(length=9)])
    assert os.listdir(tmp_path) == ["step-00000001.parquet"]
    assert store.read(1)[0].length == 3


def test_a_write_cut_by_the_system_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A file size limit stops a real write part of the way, as a full disk or a quota does."""
    program = textwrap.dedent(f"""
        import resource, signal
        from tests.trajectories.test_store import TrajectoryStore, UserError, np, trajectory
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = TrajectoryStore({str(tmp_path)!r})
        store.write(1, [trajectory()])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        noise = np.random.default_rng(0).integers(0, 2**31, 100_000).astype(np.int32)
        try:
            store.write(2, [trajectory(token_ids=noise)])
        except UserError as error:
            print(error)
    """)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (
        "step-00000002.parquet: the trajectories of step 2 cannot be written: File too large" in ended.stdout
    )
    assert os.listdir(tmp_path) == ["step-00000001.parquet"]


def test_a_kill_during_the_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TrajectoryStore(tmp_path)
    store.write(1, [trajectory()])
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write(1, [trajectory(length=9)])
    assert store.read(1)[0].length == 3
    assert os.listdir(tmp_path) == ["step-00000001.parquet"]


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    store = TrajectoryStore(tmp_path)
    path = store.write(1, [trajectory(length=100)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"step-00000001\.parquet: cannot be read, it is damaged or cut short"
    ):
        store.read(1)
    with pytest.raises(UserError, match=r"step-00000001\.parquet: cannot be read"):
        store.read_notes(1)


def test_a_missing_step_and_another_version_are_named(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    path = store.write(4, [trajectory()])
    with pytest.raises(UserError, match=r"step 5 is not stored \(stored: 4 to 4, 1 steps\)"):
        store.read(5)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"gtpo_megatron.trajectories": b"9"}), path)
    with pytest.raises(UserError, match="schema version 9, but this program reads version 1"):
        store.read(4)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="schema version none"):
        store.read(4)


def test_notes_travel_in_the_file_of_their_step(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    notes = {"sampler": {"position": 8, "fingerprint": "ä"}}
    store.write(1, [trajectory()], notes)
    store.write(2, [trajectory()])
    assert store.read_notes(1) == notes and store.read_notes(2) == {}
    assert store.read(1)[0].length == 3
