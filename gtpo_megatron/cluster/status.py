"""Where a run is, from the files in its directory and from Slurm's queue. Works on a login node, in a fraction of a second."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gtpo_megatron.cluster.record import SERVERS, SERVERS_JOB, Attempt, job_ids, read_attempts
from gtpo_megatron.errors import UserError
from gtpo_megatron.registry import Server, registered
from gtpo_megatron.run.directory import Lease, Status, read_lease, read_status

TAIL_BYTES = 1 << 18  # of metrics.jsonl: several lines
QUEUE_LIMIT_S = 5.0
SECONDS = "seconds/"
T = TypeVar("T")


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm still knows."""

    job_id: str
    state: str
    nodes: str
    time_left: str
    reason: str


@dataclass(frozen=True)
class Picture:
    """What there is to know of a run; None or empty where nothing is known."""

    run: str
    status: Status | None
    lease: Lease | None
    jobs: list[QueuedJob]
    attempts: list[Attempt]
    last: dict[str, Any]  # the newest line of metrics.jsonl
    problems: list[str]  # files that cannot be read
    servers: list[Server] = field(default_factory=list)  # that are up, of those that register
    servers_jobs: list[QueuedJob] = field(default_factory=list)
    time: float = field(default_factory=time.time)

    @property
    def state(self) -> str:
        """The status' own word, unless whoever wrote it is gone; without a status what Slurm says."""
        if self.status is None:
            return self.jobs[-1].state.lower() if self.jobs else "unknown"
        if self.status.state in ("running", "stopping") and (self.lease is None or not self.lease.alive()):
            return "dead"
        if self.status.state in ("stopped", "failed") and self.jobs:
            return f"{self.status.state}, job {self.jobs[-1].state.lower()}"
        return self.status.state

    @property
    def at_risk(self) -> int | None:
        """Steps that are lost if the run were killed now."""
        if self.status is None:
            return None
        return max(0, self.status.step - (self.status.checkpoint_step or 0))

    def as_dict(self) -> dict[str, Any]:
        """For --json."""

        def plain(value: Any) -> Any:
            return None if value is None else vars(value)

        return {
            "run": self.run,
            "state": self.state,
            "time": self.time,
            "status": plain(self.status),
            "lease": plain(self.lease),
            "jobs": [vars(job) for job in self.jobs],
            "servers_jobs": [vars(job) for job in self.servers_jobs],
            "servers": [vars(server) for server in self.servers],
            "attempts": [vars(attempt) for attempt in self.attempts],
            "steps_at_risk": self.at_risk,
            "seconds": seconds(self.last),
            "problems": self.problems,
        }


def look(run: Path) -> Picture:
    """The picture of the run in the directory `run`. Raises UserError only if there is no such directory."""
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; give a run's directory, e.g. runs/quickstart")
    problems: list[str] = []

    def read(what: Callable[[], T], otherwise: T) -> T:
        """What can be read is shown, whatever else of the directory is damaged."""
        try:
            return what()
        except (UserError, OSError) as error:
            problems.append(str(error))
            return otherwise

    ids = read(lambda: job_ids(run), [])
    of_servers = read(lambda: job_ids(run, SERVERS_JOB), [])
    jobs = queued([*ids, *of_servers])
    own = [job for job in jobs if job.job_id.partition("+")[0] in ids]  # 7+0, 7+1: components of one job
    return Picture(
        run=str(run),
        status=read(lambda: read_status(run), None),
        lease=read(lambda: read_lease(run), None),
        jobs=own,
        attempts=read(lambda: read_attempts(run), []),
        last=newest_metrics(run),
        problems=problems,
        servers=read(lambda: registered(run / SERVERS), []),
        servers_jobs=[job for job in jobs if job not in own],
    )


def queued(ids: list[str]) -> list[QueuedJob]:
    """Those of the jobs that are in Slurm's queue; none where there is no Slurm, or it does not answer."""
    if not ids or shutil.which("squeue") is None:
        return []
    words = ["squeue", "--noheader", f"--jobs={','.join(ids)}", "--format=%i|%T|%N|%L|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=QUEUE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return []
    rows = (line.strip().split("|") for line in done.stdout.splitlines())
    return [QueuedJob(*row) for row in rows if len(row) == 5]


def newest_metrics(run: Path) -> dict[str, Any]:
    """The newest line of metrics.jsonl that is of a training step, from the file's end alone; {} without one."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(row, dict) and any(name.startswith(SECONDS) for name in row):
            return row
    return {}


def seconds(metrics: dict[str, Any]) -> dict[str, float]:
    """Seconds of the newest step by stage, the longest first."""
    stages = {name.removeprefix(SECONDS): s for name, s in metrics.items() if name.startswith(SECONDS)}
    return dict(sorted(stages.items(), key=lambda item: -item[1]))
