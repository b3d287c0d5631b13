"""Servers and trainer as components of one heterogeneous job, which Slurm starts, requeues and ends as a whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.run.directory import read_status
from tests.slurm.runs import (
    TRAIN,
    check_served,
    ended,
    hold,
    last_line,
    registered_urls,
    steps,
    wait_until,
    wait_until_held,
)
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
START_S = 400.0  # of a server, on a busy machine
SERVE = "[g]tpo_megatron serve"


def node_of(cluster: VirtualSlurm, job_id: str, component: int) -> str:
    return cluster.job(f"{job_id}+{component}")["NodeList"]


def is_running(run: Path) -> bool:
    try:
        return read_status(run).state == "running"
    except UserError:  # not begun
        return False


def is_serving(cluster: VirtualSlurm, node: str) -> bool:
    return cluster.run("pgrep", "-f", SERVE, node=node, check=False).returncode == 0


def test_both_components_are_screened_signalled_and_requeued_together(
    cluster: VirtualSlurm,
    environment: dict[str, str],
    recipe: Path,
    site: Path,
    submit: Callable[..., str],
) -> None:
    """With a server that never answers: the ranks wait for it."""
    text = site.read_text().replace("screening_s: 0", "screening_s: 60")
    site.write_text(f"{text}env: {{TMPDIR: /dev/shm}}\nsbatch_servers: ['--exclude=node[1-2]']\n")
    silent = recipe.parent / "python"
    silent.write_text("#!/bin/sh\nexec sleep 3600\n")
    silent.chmod(0o755)
    run = recipe.parent / "runs" / "small"
    words = ("--het", "--servers", "1", "rollout.engine=sglang", f"rollout.sglang.python={silent}")
    cluster.run("mount", "-o", "remount,size=16m", "/dev/shm", node="node3")
    try:
        job_id = submit("small", *words)
        wait_until(lambda: is_running(run), "the ranks wait for a server")
    finally:
        cluster.run("mount", "-o", "remount,size=50%", "/dev/shm", node="node3")
    log = (run / f"slurm-{job_id}.log").read_text()
    assert "END failed at step 0: 1 of 3 nodes are unfit, 0 to spare: node3: /dev/shm: 1" in log
    assert "; requeued without node3" in log
    assert [node_of(cluster, job_id, n) for n in (0, 1)] == ["node[1-2]", "node4"]
    wait_until(lambda: is_serving(cluster, "node4"), "servers are being started")
    shown = json.loads(cluster.run(*TRAIN, "status", run, "--json", environment=environment).stdout)
    assert [(job["job_id"], job["nodes"]) for job in shown["jobs"]] == [
        (f"{job_id}+0", "node[1-2]"),
        (f"{job_id}+1", "node4"),
    ]
    assert shown["servers_jobs"] == []

    cluster.run("scancel", "--signal=USR1", job_id)
    wait_until(lambda: len(ended(run)) == 2, "the ranks have ended")
    assert [row[1:] for row in ended(run)] == [[job_id, "0", "unfit"], [job_id, "0", "3"]]
    wait_until(lambda: (run / "attempts/3/rank-0.log").exists(), "the third attempt")
    assert [cluster.job(f"{job_id}+{n}")["Restarts"] for n in (0, 1)] == ["2", "2"]
    wait_until(lambda: is_serving(cluster, "node4"), "servers are being started again")

    cluster.run("scancel", job_id)
    cluster.wait_for_job(job_id)
    cluster.wait_until_idle()
    assert not [node for node in cluster.nodes if is_serving(cluster, node)]


@pytest.mark.sglang
@pytest.mark.soak
def test_a_run_with_a_real_server_is_stopped_and_goes_on(
    cluster: VirtualSlurm, recipe: Path, site: Path, sglang_python: str, submit: Callable[..., str]
) -> None:
    """Two ranks a node, TP2 x DP2."""
    site.write_text(site.read_text().replace("ranks_per_node: 1", "ranks_per_node: 2"))
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    words = ("rollout.engine=sglang", f"rollout.sglang.python={sglang_python}")
    words += ("rollout.sglang.verify_every=1", "training.steps=6")
    job_id = submit("small", "--het", "--servers", "1", *words)
    wait_until(lambda: len(steps(run)) == 2, "two steps", START_S)
    serving = node_of(cluster, job_id, 1)
    assert serving not in node_of(cluster, job_id, 0)
    assert [url.rpartition(":")[0] for url in registered_urls(run)] == [f"http://{serving}"]

    wait_until_held(run, 2, samplers=1)
    cluster.run("scancel", "--signal=USR1", job_id)
    wait_until(lambda: read_status(run).state == "stopping", "the signal has reached rank 0")
    (run.parents[1] / "hold").unlink()
    job = cluster.wait_for_job(job_id, START_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert cluster.wait_for_job(f"{job_id}+1")["Restarts"] == "1"
    assert [how for *_, how in ended(run)] == ["3", "0"]
    assert last_line(run, job_id).endswith("END complete at step 6")
    assert len(list((run / "attempts/2").glob("rank-*.log"))) == 4
    check_served(run, 6)
    assert registered_urls(run) == []
