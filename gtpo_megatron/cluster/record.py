"""What the jobs of a run leave in its directory beside the run's own files."""

from dataclasses import dataclass
from pathlib import Path

SUBMISSIONS = "submissions"  # a folder in it for each submission, by number
JOB = "job_id"  # in that folder, once Slurm has taken it


@dataclass(frozen=True)
class Attempt:
    """A start of the run by a job, which has ended: one line of attempts/ended, written by slurm/lib.sh."""

    number: int
    job_id: str
    step: int
    how: str  # exit code, or "term"


def job_ids(run: Path) -> list[str]:
    """The jobs that were submitted for a run, oldest first."""
    files = [path for path in run.glob(f"{SUBMISSIONS}/*/{JOB}") if path.parent.name.isdigit()]
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
