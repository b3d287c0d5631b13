"""What the jobs of a run leave in its directory beside the run's own files."""

import re
from dataclasses import dataclass
from pathlib import Path

SUBMISSIONS = "submissions"  # a folder in it for each submission, by number
JOB = "job_id"  # in that folder, once Slurm has taken it
SERVERS_JOB = "servers_job_id"  # the same of the job (an array) of its servers
SERVERS = "servers"  # a folder in which servers register; slurm/lib.sh knows the name as well
KEY_VARIABLE = "GTPO_SERVERS_KEY"  # in which slurm/lib.sh gives ranks and servers their key
_TIME = re.compile(r"\d+\.\d{3}")  # seconds since the epoch


@dataclass(frozen=True)
class Attempt:
    """A start of the run by a job, which has ended: one line of attempts/ended, written by slurm/lib.sh."""

    number: int
    job_id: str
    step: int
    how: str  # exit code, "term", or "hung"


@dataclass(frozen=True)
class Start:
    """A start of the run by a job, whether it has ended or not: what slurm/lib.sh writes into attempts/N/times."""

    number: int
    job_id: str  # "none" outside Slurm
    began: float  # seconds since the epoch
    ended: float | None  # None: it runs, or was cut off with its node
    how: str | None  # as in Attempt; None also where the job ended before it started the ranks


def job_ids(run: Path, file: str = JOB) -> list[str]:
    """The jobs that were submitted for a run, oldest first; with SERVERS_JOB those of its servers."""
    return [path.read_text().strip() for path in _of_submissions(run, file)]


def submitted(run: Path) -> dict[str, float]:
    """When which job was submitted, in seconds since the epoch: the time of the file with its number."""
    return {path.read_text().strip(): path.stat().st_mtime for path in _of_submissions(run, JOB)}


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts that have ended, oldest first; a line that is cut short is left out."""
    try:
        rows = [
            line.split() for line in (run / "attempts" / "ended").read_text(errors="replace").splitlines()
        ]
    except OSError:
        return []
    return [
        Attempt(int(row[0]), row[1], int(row[2]), row[3])
        for row in rows
        if len(row) == 4 and row[0].isdigit() and row[2].isdigit()
    ]


def read_starts(run: Path) -> list[Start]:
    """The starts that left their times, in the order of their begin; one without, or with damaged ones, is left out."""
    how = {attempt.number: attempt.how for attempt in read_attempts(run)}
    starts = []
    for path in (run / "attempts").glob("*/times"):
        if path.parent.is_symlink() or not path.parent.name.isdigit():
            continue
        number = int(path.parent.name)
        try:
            words = [line.split() for line in path.read_text(errors="replace").splitlines()]
        except OSError:
            continue
        began = [row for row in words if len(row) == 3 and row[0] == "began" and _TIME.fullmatch(row[1])]
        ended = [row for row in words if len(row) == 2 and row[0] == "ended" and _TIME.fullmatch(row[1])]
        if began:
            end = float(ended[-1][1]) if ended else None
            starts.append(Start(number, began[0][2], float(began[0][1]), end, how.get(number)))
    return sorted(starts, key=lambda start: start.began)


def _of_submissions(run: Path, file: str) -> list[Path]:
    files = [path for path in run.glob(f"{SUBMISSIONS}/*/{file}") if path.parent.name.isdigit()]
    return sorted(files, key=lambda path: int(path.parent.name))
