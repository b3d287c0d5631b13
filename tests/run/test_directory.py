"""A run's directory: one owner at a time, dead ones taken over, and a status that is true and whole."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.run import directory
from gtpo_megatron.run.directory import STALE_S, Lease, Owner, acquire, read_lease, read_status, release

HOLDER = """
import sys, time
from pathlib import Path
from gtpo_megatron.run.directory import Owner
owner = Owner(Path(sys.argv[1]), steps=7)
print("owns", flush=True)
time.sleep(600)
"""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that owns the directory."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"owns\n"
        yield process
        process.kill()


def test_a_second_start_is_refused_and_told_by_whom(tmp_path: Path, holder: subprocess.Popen) -> None:
    before = (tmp_path / "status.json").read_text()
    with pytest.raises(UserError) as refusal:
        Owner(tmp_path, steps=1)
    message = str(refusal.value)
    assert f"process {holder.pid} on {socket.gethostname()}" in message and str(tmp_path) in message
    assert json.loads(before)["pid"] == read_status(tmp_path).pid == holder.pid
    assert {path.name for path in tmp_path.iterdir()} == {"lease.json", "status.json"}


def test_the_directory_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.kill()
    holder.wait()
    assert read_status(tmp_path).state == "running"  # it had no time to say otherwise
    owner = Owner(tmp_path, steps=3)
    assert read_lease(tmp_path).pid == read_status(tmp_path).pid == os.getpid()
    owner.end(None, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"status.json"}


def test_a_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    own = directory._own_lease()
    acquire(tmp_path, replace(own, token="former", started=own.started - 1))
    acquire(tmp_path, own)
    assert read_lease(tmp_path) == own


@pytest.mark.parametrize("elsewhere", [{"host": "node-17"}, {"namespace": "pid:[1]"}])
def test_an_owner_elsewhere_is_dead_when_its_heart_stops(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    own = directory._own_lease()
    other = replace(own, token="other", job_id="4711", pid=2**22 + 1, **elsewhere)
    acquire(tmp_path, other)
    with pytest.raises(UserError, match="Slurm job 4711"):
        acquire(tmp_path, own)
    (tmp_path / "lease.json").unlink()
    acquire(tmp_path, replace(other, heartbeat=time.time() - STALE_S - 1))
    acquire(tmp_path, own)
    assert read_lease(tmp_path) == own


def contest(path: Path, makers: int) -> list[Lease]:
    """Leases of those who got the directory, of many that try at once."""
    start = threading.Barrier(makers)

    def attempt(number: int) -> Lease | None:
        own = replace(directory._own_lease(), token=f"{number}")
        start.wait()
        try:
            acquire(path, own)
            return own
        except UserError:
            return None

    with ThreadPoolExecutor(makers) as pool:
        return [lease for lease in pool.map(attempt, range(makers)) if lease is not None]


@pytest.mark.parametrize("dead_owners", [0, 1, 2])
def test_of_many_starts_at_once_one_succeeds(tmp_path: Path, dead_owners: int) -> None:
    own = directory._own_lease()
    for attempt in range(20):
        path = tmp_path / str(attempt)
        path.mkdir()
        dead = [replace(own, token=f"dead-{n}", started=own.started - 1) for n in range(dead_owners)]
        if dead:
            acquire(path, dead[0])
        if len(dead) == 2:  # died while it took over from the first
            directory._write(directory._claim(path, dead[0]), dead[1])
        winners = contest(path, 8)
        assert [read_lease(path)] == winners
        assert [file.name for file in path.iterdir()] == ["lease.json"]


@pytest.mark.parametrize(
    "job_id, restarts, alive",
    [("41", "1", False), ("41", "0", True), ("41", None, True), ("42", "1", True), (None, None, True)],
)
def test_a_requeued_job_need_not_wait_for_what_it_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_id: str | None, restarts: str | None, alive: bool
) -> None:
    own = directory._own_lease()
    lost = replace(own, host="node-17", job_id="41", restarts=0, token="lost", heartbeat=time.time())
    acquire(tmp_path, lost)
    for name, value in (("SLURM_JOB_ID", job_id), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert lost.alive() == alive
    if not alive:
        acquire(tmp_path, own)
        assert read_lease(tmp_path) == own


def test_a_lease_is_given_free_by_its_owner_alone(tmp_path: Path) -> None:
    own = directory._own_lease()
    acquire(tmp_path, own)
    release(tmp_path, replace(own, token="another"))
    assert read_lease(tmp_path) == own
    release(tmp_path, own)
    assert read_lease(tmp_path) is None


def test_an_owner_who_was_taken_for_dead_notices(tmp_path: Path) -> None:
    owner = Owner(tmp_path, steps=3, beat_s=0.01)
    owner.check()
    other = replace(directory._own_lease(), host="node-17", token="other")
    directory._write(tmp_path / "lease.json", other)
    wait_until(lambda: owner.lost is not None)
    with pytest.raises(UserError, match="taken over by process .* on node-17"):
        owner.check()
    owner.end(None, 0)
    assert read_lease(tmp_path) == other
    assert read_status(tmp_path).state == "running"  # the other's to say


def test_the_heart_beats(tmp_path: Path) -> None:
    owner = Owner(tmp_path, steps=3, beat_s=0.01)
    lease, status = read_lease(tmp_path), read_status(tmp_path)
    wait_until(lambda: read_lease(tmp_path).heartbeat > lease.heartbeat)
    wait_until(lambda: read_status(tmp_path).heartbeat > status.heartbeat)
    owner.end(None, 0)


def test_the_status_says_how_the_run_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    owner = Owner(tmp_path, steps=3)
    status = read_status(tmp_path)
    assert (status.state, status.step, status.steps, status.checkpoint_step) == ("running", 0, 3, None)
    assert (status.host, status.pid, status.job_id) == (socket.gethostname(), os.getpid(), "99")
    assert status.exit_code is None and status.message == ""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").symlink_to("step-000002")
    owner.update(step=2)
    owner.stage("training")
    wait_until(lambda: read_status(tmp_path).stage == "training")
    status = read_status(tmp_path)
    assert (status.step, status.checkpoint_step) == (2, 2)
    assert status.stage_since <= status.heartbeat and status.checkpoint_time <= status.heartbeat
    owner.stopping = True
    wait_until(lambda: read_status(tmp_path).state == "stopping")
    owner.end(None, 3)
    owner.end(ValueError("too late"), 1)
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.stage) == ("stopped", 3, "")


def test_how_a_run_ended_is_said(tmp_path: Path) -> None:
    for error, code, state in ((None, 0, "complete"), (UserError("mend it"), 2, "failed")):
        Owner(tmp_path, steps=3).end(error, code)
        status = read_status(tmp_path)
        assert (status.state, status.exit_code, status.message) == (state, code, str(error or ""))


@pytest.mark.parametrize("content", ["", "[]", "null", '{"host": 1}', "\x00"])
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    for name, read in (("lease.json", read_lease), ("status.json", read_status)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            read(tmp_path)


def test_a_status_is_read_without_torch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_status(tmp_path)
    Owner(tmp_path, steps=3).end(None, 0)
    code = (
        "import sys; from gtpo_megatron.run.directory import read_status; "
        "assert read_status(sys.argv[1]).state == 'complete'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
