"""Real SGLang servers on nodes of their own: as jobs that come and go, and as a step that is started again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo_megatron.cluster.record import SERVERS_JOB, job_ids
from tests.slurm.runs import TRAIN, check_served, hold, last_line, registered_urls, steps, wait_until
from tests.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.sglang]
START_S = 400.0  # of a server, on a busy machine


@pytest.fixture
def sglang(sglang_python: str) -> tuple[str, ...]:
    return (
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang_python}",
        "rollout.sglang.verify_every=1",
        "training.steps=6",
    )


@pytest.mark.soak
def test_a_job_of_servers_leaves_and_comes_back_while_the_run_goes_on(
    cluster: VirtualSlurm,
    environment: dict[str, str],
    recipe: Path,
    site: Path,
    sglang: tuple[str, ...],
    submit: Callable[..., str],
) -> None:
    with site.open("a") as file:
        file.write("sbatch_servers: [--nodelist=node4]\n")
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    job_id = submit("small", "--servers-job", "1", *sglang)
    wait_until(lambda: len(steps(run)) == 2, "two steps", START_S)
    shown = json.loads(cluster.run(*TRAIN, "status", run, "--json", environment=environment).stdout)
    (server,) = shown["servers"]
    (array,) = job_ids(run, SERVERS_JOB)
    (queued,) = shown["servers_jobs"]
    assert (queued["job_id"], queued["state"]) == (f"{array}_1", "RUNNING")
    assert server["url"].startswith(f"http://{queued['nodes']}:")
    assert queued["nodes"] == "node4"  # the weights go over the network

    # what Slurm does to a job for which it has a better use
    cluster.run("scontrol", "requeue", f"{array}_1")
    wait_until(lambda: not registered_urls(run), "the server has left", 60)
    (run.parents[1] / "hold").unlink()
    job = cluster.wait_for_job(job_id, START_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0")
    check_served(run, 6)
    of_servers = cluster.wait_for_job(f"{array}_1")
    assert (of_servers["JobState"], of_servers["Restarts"]) == ("COMPLETED", "1")  # with the run
    assert last_line(run, server["job_id"]).endswith("END complete at step 6")
    assert registered_urls(run) == []


@pytest.mark.soak
def test_a_step_of_servers_that_ends_is_started_again_beside_the_ranks(
    cluster: VirtualSlurm, recipe: Path, sglang: tuple[str, ...], submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    job_id = submit("small", "--servers", "1", *sglang)
    wait_until(lambda: len(steps(run)) == 2, "two steps", START_S)
    (url,) = registered_urls(run)
    assert url.startswith("http://node1:")  # the first node serves, the others train
    keeper = cluster.run("pgrep", "-f", "gtpo_megatron serve", node="node1").stdout.split()[-1]
    cluster.run("kill", "-KILL", keeper, node="node1")  # takes nothing back, and the server ends with it
    (run.parents[1] / "hold").unlink()
    job = cluster.wait_for_job(job_id, START_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0")
    check_served(run, 6)
    assert "the servers ended with 137" in (run / f"slurm-{job_id}.log").read_text()
    assert registered_urls(run) in (
        [],
        [url],
    )  # the one that was killed is passed over when it has not been heard of for a while


def test_servers_that_cannot_start_end_the_job_as_a_mistake(
    cluster: VirtualSlurm, recipe: Path, tmp_path: Path, submit: Callable[..., str]
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such model\nexit 1\n")
    broken.chmod(0o755)
    job_id = submit("broken", "--servers", "1", "rollout.engine=sglang", f"rollout.sglang.python={broken}")
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0")
    line = last_line(recipe.parent / "runs" / "broken", job_id)
    assert "END mistake: gtpo-megatron: the SGLang server 0 did not start" in line and "no such model" in line
