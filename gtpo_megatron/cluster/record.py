"""What the jobs of a run leave in its directory beside the run's own files."""

from dataclasses import dataclass
from pathlib import Path

SUBMISSIONS = "submissions"  # a folder in it for each submission, by number
JOB = "job_id"  # in that folder, once Slurm has taken it
SERVERS_JOB = "servers_job_id"  # the same of the job (an array) of its servers
SERVERS = "servers"  # a folder in which servers register; slurm/lib.sh knows the name as well
KEY_VARIABLE = "GTPO_SERVERS_KEY"  # in which slurm/lib.sh gives ranks and servers their key


@dataclass(frozen=True)
class Attempt:
    """A start of the run by a job, which has ended: one line of attempts/ended, written by slurm/lib.sh."""

    number: int
    job_id: str
    step: int
    how: str  # exit code, "term", or "hung"


def job_ids(run: Path, file: str = JOB) -> list[str]:
    """The jobs that were submitted for a run, oldest first; with SERVERS_JOB those of its servers."""
    files = [path for path in run.glob(f"{SUBMISSIONS}/*/{file}") if path.parent.name.isdigit()]
    return [path.read_text().strip() for path in sorted(files, key=lambda path: int(path.parent.name))]


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts that have ended, oldest first; a line that is cut short is left out."""
    try:
        rows = [line.split() for line in (run / "attempts" / "ended").read_text().splitlines()]
    except OSError:
        return []
    return [
        Attempt(int(row[0]), row[1], int(row[2]), row[3])
        for row in rows
        if len(row) == 4 and row[0].isdigit() and row[2].isdigit()
    ]
