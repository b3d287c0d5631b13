"""The picture of a run from its directory, whole or with parts missing, by the command line."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo_megatron.cluster import status as module
from gtpo_megatron.cluster.status import QueuedJob, look
from gtpo_megatron.commands.status import lines
from gtpo_megatron.errors import STOPPED, UserError
from gtpo_megatron.run.directory import Owner, read_lease

ROOT = Path(__file__).parents[2]


@pytest.fixture
def owned(tmp_path: Path) -> Owner:
    """A run under way in tmp_path, with a checkpoint of step 4 and metrics of step 6."""
    owner = Owner(tmp_path, steps=10, beat_s=0.05)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").symlink_to("step-00000004")
    owner.update(step=6)
    owner.stage("sampling")
    rows = [{"step": 6, "seconds/sampling": 2.5, "seconds/training": 7.25}, {"step": 6, "eval/accuracy": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 7, ')
    deadline = time.monotonic() + 30
    while (found := look(tmp_path).status) is None or (found.stage, found.checkpoint_step) != ("sampling", 4):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return owner


def test_a_run_under_way(owned: Owner, tmp_path: Path) -> None:
    picture = look(tmp_path)
    assert (picture.state, picture.at_risk, picture.problems) == ("running", 2, [])
    shown = dict(lines(picture))
    assert shown["step"] == "6 of 10"
    assert shown["stage"].startswith("sampling, for ")
    assert shown["checkpoint"].startswith("of step 4, ")
    assert shown["at risk"] == "2 steps if it were killed now"
    assert shown["seconds"] == "training 7.2, sampling 2.5 (step 6)"
    assert f"process {os.getpid()}" in shown["owner"]
    owned.end(None, STOPPED)


def test_a_run_whose_process_is_gone_is_dead(owned: Owner, tmp_path: Path) -> None:
    picture = look(tmp_path)
    gone = replace(read_lease(tmp_path), host="elsewhere", heartbeat=time.time() - 3600)
    assert replace(picture, lease=gone).state == "dead"
    assert replace(picture, lease=None).state == "dead"
    owned.end(None, STOPPED)
    ended = look(tmp_path)
    assert (ended.state, ended.lease) == ("stopped", None)
    assert "at risk" not in dict(lines(ended))
    waiting = replace(ended, jobs=[QueuedJob("7", "PENDING", "", "4:00:00", "Priority")])
    assert waiting.state == "stopped, job pending"
    assert dict(lines(waiting))["job"] == "7 pending (Priority)"


def test_nothing_there_is_said(tmp_path: Path) -> None:
    picture = look(tmp_path)
    assert picture.state == "unknown"
    assert "status.json: no such file" in dict(lines(picture))["note"]
    json.dumps(picture.as_dict())


def test_damaged_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running"')
    (tmp_path / "lease.json").write_text("[]")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n")
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "ended").write_bytes(b"1 41 5 1\n\xff 41 6 1\n2 41")
    (tmp_path / "submissions" / "1" / "job_id").mkdir(parents=True)
    (tmp_path / "servers").write_text("a file where a folder is due")
    picture = look(tmp_path)
    assert len(picture.problems) == 4
    for name in ("status.json", "lease.json", "submissions/1/job_id", "servers"):
        assert any(str(tmp_path / name) in problem for problem in picture.problems), name
    assert dict(lines(picture))["attempt"] == "1: job 41, failed with 1 at step 5"


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        look(tmp_path / "none")


@pytest.mark.parametrize(
    "squeue, jobs",
    [
        ("echo '41|RUNNING|node[1-2]|9:59|None'", [QueuedJob("41", "RUNNING", "node[1-2]", "9:59", "None")]),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
        ("exec sleep 60", []),
    ],
    ids=["running", "unknown to Slurm", "no answer"],
)
def test_the_queue_is_asked_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, jobs: list[QueuedJob]
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module, "QUEUE_LIMIT_S", 0.5)
    assert module.queued(["41"]) == jobs
    assert module.queued([]) == []


def test_the_command_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from gtpo_megatron.commands.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", tmp_path, "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "unknown"
