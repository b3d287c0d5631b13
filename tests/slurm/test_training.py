"""Training on a real Slurm of virtual nodes: what the sbatch file and the ranks do when they end, in all ways."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.errors import COMPLETE, MISTAKE
from gtpo_megatron.run.directory import read_status
from gtpo_megatron.run.metrics import read_metrics
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
TRAIN = (sys.executable, "-m", "gtpo_megatron")


@pytest.fixture
def submit(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> Callable[..., tuple[str, Path]]:
    """Submit the recipe by the command line, on two nodes: the job's number and the run's directory."""

    def call(name: str, *words: str) -> tuple[str, Path]:
        command = (*TRAIN, "submit", recipe, "--site", site, "--nodes", "2", f"name={name}", *words)
        cluster.run(*command, environment=environment)
        run = recipe.parent / "runs" / name
        return (run / "submissions" / "1" / "job_id").read_text().strip(), run

    return call


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s} s: {what}"
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path)] if path.exists() else []


def last_line(run: Path, job_id: str) -> str:
    return (run / f"slurm-{job_id}.log").read_text().splitlines()[-1]


def ended(run: Path) -> list[list[str]]:
    return [line.split() for line in (run / "attempts" / "ended").read_text().splitlines()]


def figures(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    measured = ("time", "tokens_per_second", "memory/peak_gib")
    return [
        {name: value for name, value in row.items() if name not in measured and "seconds/" not in name}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def test_a_stopped_run_is_requeued_and_ends_as_one_that_was_not(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, submit: Callable[..., tuple[str, Path]]
) -> None:
    job_id, run = submit("stopped")
    wait_until(lambda: len(steps(run)) >= 3, "three steps")
    shown = json.loads(cluster.run(*TRAIN, "status", run, "--json", environment=environment).stdout)
    assert (shown["state"], shown["status"]["job_id"]) == ("running", job_id)
    assert [(job["job_id"], job["state"], job["nodes"]) for job in shown["jobs"]] == [
        (job_id, "RUNNING", "node[1-2]")
    ]
    cluster.run("scancel", "--signal=USR1", job_id)
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    (first, second) = ended(run)
    assert (first[0], first[1], first[3]) == ("1", job_id, "3")
    assert 3 <= int(first[2]) < 12  # it stopped under way
    assert second == ["2", job_id, "12", "0"]
    assert last_line(run, job_id).endswith("END complete at step 12")
    assert read_status(run).exit_code == COMPLETE
    assert {path.name for path in (run / "attempts" / "latest").iterdir()} == {
        "srun.log",
        "rank-0.log",
        "rank-1.log",
    }

    # the same ranks on the same nodes without an interruption, by a plain srun: one world of two, and no launcher else
    plain = recipe.parent / "runs" / "plain"
    srun = ("srun", "--nodes=2", "--ntasks=2", "--mem=1000")
    cluster.run(*srun, *TRAIN, "train", recipe, "name=plain", environment=environment, timeout_s=240)
    assert sorted(path.name for path in (plain / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert figures(run) == figures(plain)
    assert steps(run) == list(range(1, 13))


def test_a_mistake_is_said_in_the_last_line_and_not_requeued(
    cluster: VirtualSlurm, recipe: Path, submit: Callable[..., tuple[str, Path]]
) -> None:
    job_id, run = submit("mistake", "--hold-for-the-test") if False else submit("mistake")
    (recipe.parent / "prompts.jsonl").unlink()  # after submit has looked
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", f"{MISTAKE}:0")
    assert "END mistake: gtpo-megatron: " in last_line(run, job_id)
    assert "prompts.jsonl" in last_line(run, job_id)
    assert ended(run) == [["1", job_id, "0", "2"]]
