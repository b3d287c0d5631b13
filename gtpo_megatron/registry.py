"""Servers that come and go while a run goes on: each that is up has a small file in a folder, which the trainer watches.

A file is written under another name and renamed into place, written again at every beat, and removed when its server
leaves. A server whose node was lost cannot remove it: a file that was not renewed for STALE_S does not count. (Clocks of the
hosts are taken to agree within a fraction of that.) Standard library only: a login node reads the folder as well.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

BEAT_S = 10.0  # between two writes of a file
STALE_S = 120.0
_SUFFIX = ".json"


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    url: str  # http://host:port
    host: str
    pid: int  # of the process that keeps it
    job_id: str | None  # Slurm's
    since: float  # seconds since the epoch
    heartbeat: float


def this_server(url: str) -> Server:
    """The server at `url`, kept by this process, as of now."""
    now = time.time()
    return Server(url, socket.gethostname(), os.getpid(), os.environ.get("SLURM_JOB_ID"), now, now)


def register(folder: Path, server: Server) -> None:
    """Write the server's file, or renew it. The folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid.uuid4().hex}.partial"
    try:
        partial.write_text(
            f"{json.dumps(asdict(replace(server, heartbeat=time.time())))}\n", encoding="utf-8"
        )
        partial.replace(_file(folder, server))
    finally:
        partial.unlink(missing_ok=True)


def unregister(folder: Path, server: Server) -> None:
    """Remove the server's file, if it is there."""
    _file(folder, server).unlink(missing_ok=True)


def registered(folder: Path) -> list[Server]:
    """The servers that are up, in the order of their file names; none if there is no folder.

    Files that are damaged or no longer renewed are passed over: a server is worth less than the run.

    Raises:
        OSError: the folder is there and cannot be read, as for a moment on a network's file system: not "no servers".
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    found = (_read(folder / name) for name in names if name.endswith(_SUFFIX) and not name.startswith("."))
    return [server for server in found if server and time.time() - server.heartbeat < STALE_S]


def _file(folder: Path, server: Server) -> Path:
    parts = urlsplit(server.url)
    return folder / f"{parts.hostname}-{parts.port}{_SUFFIX}"


def _read(path: Path) -> Server | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        server = Server(**{field.name: content[field.name] for field in fields(Server)})
        parts = urlsplit(server.url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port
        return server if sound and isinstance(server.heartbeat, int | float) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
