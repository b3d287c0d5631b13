"""Jobs that meet: two runs on the same nodes at once, and two jobs of one run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo_megatron.cluster.record import job_ids
from gtpo_megatron.run.directory import LEASE
from tests.slurm.runs import figures, hold, last_line, steps, wait_until
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm


@pytest.mark.soak
def test_two_runs_on_the_same_nodes_and_a_second_job_of_one_of_them(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    site.write_text(site.read_text().replace("--mem=1000", "--exclude=node[3-4]\n- --mem=1000"))
    runs = recipe.parent / "runs"
    runs.mkdir()
    hold(runs / "fought-over", 1)
    jobs = [submit(name, "training.steps=2") for name in ("fought-over", "fought-over", "other")]
    assert job_ids(runs / "fought-over") == jobs[:2]

    wait_until(lambda: "FAILED" in states(cluster, jobs[:2]), "one of the two jobs is refused")
    refused = jobs[states(cluster, jobs[:2]).index("FAILED")]
    holder = next(job for job in jobs[:2] if job != refused)
    wait_until(lambda: steps(runs / "fought-over") == [1], "a step of the other")
    assert cluster.job(refused)["ExitCode"] == "2:0"
    line = last_line(runs / "fought-over", refused)
    assert "END mistake: gtpo-megatron: " in line and f"Slurm job {holder}, " in line
    (runs.parent / "hold").unlink()

    for job_id in (holder, jobs[2]):
        job = cluster.wait_for_job(job_id)
        assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "0", "node[1-2]")
    assert steps(runs / "fought-over") == [1, 2]
    assert figures(runs / "fought-over") == figures(runs / "other")  # nothing went from one to the other
    assert not (runs / "fought-over" / LEASE).exists()


def states(cluster: VirtualSlurm, jobs: list[str]) -> list[str]:
    return [cluster.job(job)["JobState"] for job in jobs]
