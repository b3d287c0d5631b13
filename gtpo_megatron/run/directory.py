"""A run's directory has one owner at a time, and says how the run stands. No torch: a login node reads both files.

lease.json   who owns the directory: host, process, job, a heartbeat. There is none while nobody runs.
status.json  how the run stands: state, step, stage. It stays when the run has ended.

Both are replaced whole. Locks by flock are not used: they do not hold on Lustre. Between hosts, whose clocks are taken to
agree within a fraction of STALE_S, an owner is dead when its heartbeat stops.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gtpo_megatron.errors import COMPLETE, UserError

LEASE = "lease.json"
STATUS = "status.json"
BEAT_S = 10.0  # between heartbeats
STALE_S = 120.0  # a heartbeat older than this is a dead owner's
_ATTEMPTS = 20  # at a lease that others take and leave at the same moment
_STEP = re.compile(r"step-(\d+)")

State = Literal["running", "stopping", "stopped", "complete", "failed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Who owns a run's directory."""

    host: str
    pid: int
    namespace: (
        str  # of process ids: those of two containers on a host say nothing of each other; "" if unknown
    )
    started: int  # when the process started, in clock ticks since its host did; 0 if unknown
    job_id: str | None  # Slurm's
    restarts: int  # how often Slurm had requeued that job when it took the directory
    token: str  # of this ownership alone
    heartbeat: float  # seconds since the epoch

    def __str__(self) -> str:
        job = f", Slurm job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, heartbeat {time.time() - self.heartbeat:.0f} s ago"

    def alive(self) -> bool:
        """Whether the owner still runs, as far as can be known from here.

        Slurm starts a job again only when it has ended what it started before, or has lost the node.
        """
        same_job = self.job_id is not None and self.job_id == os.environ.get("SLURM_JOB_ID")
        if same_job and self.restarts < _restarts():
            return False
        if (self.host, self.namespace) == (socket.gethostname(), _namespace()):
            return _started(self.pid) == self.started
        return time.time() - self.heartbeat < STALE_S


@dataclass(frozen=True)
class Status:
    """How a run stands. Times are seconds since the epoch."""

    state: State
    message: str  # of the error that ended the run; "" without one
    step: int  # done
    steps: int  # to do in all
    stage: str  # that is under way; "" between stages
    stage_since: float
    heartbeat: float  # when this was written
    host: str
    pid: int
    job_id: str | None  # Slurm's
    checkpoint_step: int | None  # of the newest whole checkpoint
    checkpoint_time: float | None
    exit_code: int | None  # once the run has ended


def read_status(path: Path | str) -> Status:
    """How the run in the directory `path` stands.

    Raises:
        UserError: there is no status there, or it is damaged.
    """
    file = Path(path) / STATUS
    try:
        return _read(file, Status)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; is this the directory of a run?") from None


def read_lease(path: Path | str) -> Lease | None:
    """Who owns the directory `path`; None if nobody does. Raises UserError for a damaged lease."""
    return _lease(Path(path) / LEASE)


class Owner:
    """The one process that runs in a directory: keeps its lease alive and its status true, until `end`.

    A thread writes both files, so that training never waits for the file system.
    """

    def __init__(self, path: Path, steps: int, beat_s: float = BEAT_S) -> None:
        """Take the directory `path`, which is made. Raises UserError, naming the owner, if somebody else has it."""
        self._path, self._beat_s = Path(path), beat_s
        self._path.mkdir(parents=True, exist_ok=True)
        self._lease = _own_lease()
        acquire(self._path, self._lease)
        self._lost: str | None = None
        self.stopping = False  # a signal handler may set it, and may do nothing that takes a lock
        self._lock = threading.Lock()  # of the status
        own, now = self._lease, time.time()
        self._status = Status(
            "running", "", 0, steps, "start", now, now, own.host, own.pid, own.job_id, None, None, None
        )
        self._write_status()
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Change fields of the status; written soon."""
        with self._lock:
            self._status = replace(self._status, **changes)
        self._changed.set()

    def stage(self, name: str) -> None:
        """The run is in this stage from now on."""
        self.update(stage=name, stage_since=time.time())

    @property
    def lost(self) -> str | None:
        """Who has taken the directory, believing this process dead."""
        return self._lost

    def check(self) -> None:
        """Raise UserError if the directory was taken by another process."""
        if self._lost is not None:
            raise UserError(f"{self._path}: this run was taken over by {self._lost}; this process ends")

    def end(self, error: BaseException | None, exit_code: int) -> None:
        """Write the last status and give the directory free. Does nothing when called again.

        Args:
            error: what ended the run, if it failed.
            exit_code: of the process: COMPLETE, STOPPED, or that of the error.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._changed.set()
        self._thread.join()
        if self._lost is not None:
            return
        state: State = "complete" if exit_code == COMPLETE else "stopped"
        message = "" if error is None else str(error) or type(error).__name__
        self.update(
            state="failed" if error is not None else state,
            message=message,
            exit_code=exit_code,
            stage="",
            stage_since=time.time(),
        )
        with contextlib.suppress(OSError):  # a full disk must not hide what ended the run
            self._write_status()
        release(self._path, self._lease)

    def _keep(self) -> None:
        beaten, stopping = time.monotonic(), False
        while not self._ended.is_set() and self._lost is None:
            changed = self._changed.wait(min(1.0, self._beat_s))
            self._changed.clear()
            due = time.monotonic() - beaten >= self._beat_s
            if self.stopping and not stopping:
                stopping = changed = True
                self.update(state="stopping")
            if self._ended.is_set() or not (changed or due):
                continue
            try:
                if due:
                    beaten = time.monotonic()
                    self._beat()
                self._write_status()
            except (OSError, UserError) as failure:  # training goes on: it ends where something is lost by it
                log.warning("heartbeat: %s", failure)
            self._ended.wait(min(0.5, self._beat_s))  # changes that come fast are written together

    def _beat(self) -> None:
        holder = read_lease(self._path)
        if holder is None or holder.token != self._lease.token:
            self._lost = str(holder or "somebody who removed its lease")
        else:
            _write(self._path / LEASE, replace(self._lease, heartbeat=time.time()))

    def _write_status(self) -> None:
        step, when = _newest_checkpoint(self._path)
        with self._lock:
            status = replace(self._status, heartbeat=time.time(), checkpoint_step=step, checkpoint_time=when)
        if self._lost is None:
            _write(self._path / STATUS, status)


def acquire(path: Path, own: Lease) -> None:
    """Write the lease `own` where there is none, or in the place of a dead owner's; of many who try, one succeeds.

    Who replaces a dead owner first makes the claim to that owner's place, a file that exists once. A claim's maker may die
    as well: then its claim is claimed in turn, and so on.

    Raises:
        UserError: a living process owns the directory, or is taking it over.
    """
    for _ in range(_ATTEMPTS):
        if _create(path / LEASE, own):
            return
        dead = []
        holder = read_lease(path)
        while holder is not None:
            if holder.alive():
                raise UserError(
                    f"{path}: this run is going on already: {holder}. Wait for its end, stop it, or give this run "
                    f"another name (name=...). If that process is gone for certain, remove {path / LEASE}"
                )
            dead.append(holder)
            claim = _claim(path, holder)
            if _create(claim, own):
                break
            holder = _lease(claim)
        if holder is None:  # given free, or taken over by another and left, since we looked
            continue
        current = read_lease(path)
        if current is not None and current.token == dead[0].token:
            log.warning("%s: taken over from %s, which is dead", path, dead[0])
            _write(path / LEASE, own)
            for former in dead:
                _claim(path, former).unlink(missing_ok=True)
            return
        claim.unlink(missing_ok=True)
    raise UserError(f"{path}: others take and leave this run's directory all the time; start it once")


def release(path: Path, own: Lease) -> None:
    """Remove the lease, if it is `own`."""
    with contextlib.suppress(OSError, UserError):
        holder = read_lease(path)
        if holder is not None and holder.token == own.token:
            (path / LEASE).unlink(missing_ok=True)


def _lease(file: Path) -> Lease | None:
    try:
        return _read(file, Lease)
    except FileNotFoundError:
        return None


def _claim(path: Path, dead: Lease) -> Path:
    return path / f".{LEASE}.after-{dead.token}"


def _own_lease() -> Lease:
    return Lease(
        host=socket.gethostname(),
        pid=os.getpid(),
        namespace=_namespace(),
        started=_started(os.getpid()) or 0,
        job_id=os.environ.get("SLURM_JOB_ID"),
        restarts=_restarts(),
        token=uuid.uuid4().hex,
        heartbeat=time.time(),
    )


def _started(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since the host did; None if there is none of this id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *values = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(values[18])


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _newest_checkpoint(path: Path) -> tuple[int | None, float | None]:
    latest = path / "checkpoints" / "latest"  # a link that is replaced when a checkpoint is whole
    try:
        match = _STEP.fullmatch(os.readlink(latest))
        return (int(match[1]), latest.lstat().st_mtime) if match else (None, None)
    except OSError:
        return None, None


@contextlib.contextmanager
def _temporary(path: Path, content: Lease | Status) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(f"{json.dumps(asdict(content), indent=1)}\n", encoding="utf-8")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, content: Lease | Status) -> None:
    """Replace a file whole."""
    with _temporary(path, content) as temporary:
        temporary.replace(path)


def _create(path: Path, content: Lease) -> bool:
    """Write a file whole where there is none; False if there is one."""
    with _temporary(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # an answer of NFS that was lost, and asked for again
            return temporary.stat().st_nlink == 2
        return True


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return kind(**{field.name: content[field.name] for field in fields(kind)})
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged ({reason}); remove it if nothing runs there") from None
