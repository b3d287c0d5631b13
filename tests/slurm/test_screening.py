"""Nodes show that they are fit before the ranks start on them. The faults are real: of the nodes, not of the program."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gtpo_megatron.cluster.ranks import hosts
from gtpo_megatron.cluster.record import SERVERS_JOB
from tests.slurm.runs import TRAIN, ended, hold, last_line, steps, wait_until
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm


def requests(cluster: VirtualSlurm) -> dict[str, int]:
    """How many of which kind the controller has answered since `sdiag --reset`."""
    found = re.findall(r"^\s+([A-Z_]+)\s+\( *\d+\) count:(\d+)", cluster.run("sdiag").stdout, re.MULTILINE)
    return {name: int(count) for name, count in found}


@pytest.fixture
def screened(site: Path) -> None:
    text = site.read_text().replace("screening_s: 0", "screening_s: 60")  # four nodes share few cores
    site.write_text(f"{text}env: {{TMPDIR: /dev/shm}}\n")  # of each node alone


@pytest.fixture
def by_fabric(site: Path, screened: None) -> None:
    """Ranks talk by eth1, Slurm by eth0."""
    site.write_text(site.read_text().replace("interface: eth0", "interface: eth1"))


@contextmanager
def without_cable(cluster: VirtualSlurm, node: str) -> Iterator[None]:
    cluster.pull_cable(node)
    try:
        yield
    finally:
        cluster.plug_in_cable(node)


@contextmanager
def kept_apart(cluster: VirtualSlurm, node: str, other: str) -> Iterator[None]:
    """By a switch or a cable between them: what the node sends there is lost."""
    words = ("blackhole", cluster.fabric_address(other))
    cluster.run("ip", "route", "add", *words, node=node)
    try:
        yield
    finally:
        cluster.run("ip", "route", "delete", *words, node=node)


@contextmanager
def small_disk(cluster: VirtualSlurm, node: str) -> Iterator[None]:
    cluster.run("mount", "-o", "remount,size=16m", "/dev/shm", node=node)
    try:
        yield
    finally:
        cluster.run("mount", "-o", "remount,size=50%", "/dev/shm", node=node)


@contextmanager
def not_shared(cluster: VirtualSlurm, node: str, folder: Path) -> Iterator[None]:
    """The node sees an empty folder of its own there."""
    cluster.run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder, node=node)
    try:
        yield
    finally:
        cluster.run("umount", "--lazy", folder, node=node)


@pytest.mark.soak
def test_a_spare_node_takes_the_place_of_one_without_the_shared_directory(
    cluster: VirtualSlurm, recipe: Path, screened: None, submit: Callable[..., str]
) -> None:
    run = recipe.parent / "runs" / "small"
    run.mkdir(parents=True)
    hold(run, 1)
    cluster.run("sdiag", "--reset")
    with not_shared(cluster, "node2", run):
        job_id = submit("small", "--spares", "1", "training.steps=2", "optimizer.warmup_steps=0")
        wait_until(lambda: steps(run) == [1], "a step")
        pulses = sorted(path.name for path in (run / "attempts/1/pulse").glob("[0-9]*"))
        assert pulses == ["0.node1", "1.node3"]
        (run.parents[1] / "hold").unlink()
        job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "0", "node[1-3]")
    log = (run / f"slurm-{job_id}.log").read_text()
    assert "node2 is unfit: the run's directory is not shared with this node: " in log
    assert steps(run) == [1, 2]
    # what docs/cluster.md says of the controller's load: submit and its check, two steps, their end
    asked = requests(cluster)
    assert asked["REQUEST_JOB_STEP_CREATE"] == 2
    assert asked["REQUEST_SUBMIT_BATCH_JOB"] == 1


@pytest.mark.soak
def test_without_a_spare_node_the_job_goes_elsewhere_or_ends_where_there_is_none(
    cluster: VirtualSlurm, recipe: Path, screened: None, submit: Callable[..., str]
) -> None:
    runs = recipe.parent / "runs"
    settings = ("training.steps=1", "optimizer.warmup_steps=0")
    with small_disk(cluster, "node2"):
        job_id = submit("all", "--nodes", "4", *settings, "rollout.prompts_per_step=4")
        job = cluster.wait_for_job(job_id)
        assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0")
        line = last_line(runs / "all", job_id)
        assert "END mistake: 1 of 4 nodes are unfit, 0 to spare: node2: /dev/shm: 1" in line
        assert line.endswith("Slurm has too few nodes without node2: not requeued")

        job_id = submit("small", *settings)
        job = cluster.wait_for_job(job_id)
        assert (job["JobState"], job["Restarts"], job["ExcNodeList"]) == ("COMPLETED", "1", "node2")
    assert [row[1:] for row in ended(runs / "small")] == [[job_id, "0", "unfit"], [job_id, "1", "0"]]
    log = (runs / "small" / f"slurm-{job_id}.log").read_text()
    assert "END failed at step 0: 1 of 2 nodes are unfit, 0 to spare: node2: /dev/shm: 1" in log
    assert "; requeued without node2" in log


@pytest.mark.soak
def test_a_spare_node_takes_the_place_of_one_whose_cable_is_pulled(
    cluster: VirtualSlurm, recipe: Path, by_fabric: None, submit: Callable[..., str]
) -> None:
    run = recipe.parent / "runs" / "small"
    with without_cable(cluster, "node2"):  # its own all-reduce over the interface is as it should be
        job_id = submit("small", "--spares", "1", "training.steps=1", "optimizer.warmup_steps=0")
        job = cluster.wait_for_job(job_id)
    log = (run / f"slurm-{job_id}.log").read_text()
    assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "0", "node[1-3]"), log
    assert "node2 is unfit: it and 2 of 2 other nodes do not reach each other: node" in log
    assert log.count(" is unfit: ") == 1
    assert steps(run) == [1]


@pytest.mark.soak
def test_two_nodes_that_do_not_reach_each_other_are_not_used_together(
    cluster: VirtualSlurm, recipe: Path, by_fabric: None, submit: Callable[..., str]
) -> None:
    run = recipe.parent / "runs" / "small"
    with kept_apart(cluster, "node1", "node2"):
        job_id = submit("small", "training.steps=1", "optimizer.warmup_steps=0")
        job = cluster.wait_for_job(job_id)
    log = (run / f"slurm-{job_id}.log").read_text()
    assert (job["JobState"], job["Restarts"], job["ExcNodeList"]) == ("COMPLETED", "1", "node2"), log
    assert "node2" not in hosts(job["NodeList"])
    assert "node2 is unfit: it and 1 of 1 other nodes do not reach each other: node1: " in log
    assert "; requeued without node2" in log


def test_a_job_of_servers_goes_elsewhere_when_its_node_is_unfit(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path, screened: None
) -> None:
    with site.open("a") as file:
        file.write("sbatch_servers: ['--exclude=node[1-2]']\n")
    cluster.wait_until_idle()  # so that Slurm takes node3
    broken = recipe.parent / "python"
    broken.write_text("#!/bin/sh\necho no such model\nexit 1\n")
    broken.chmod(0o755)
    words = ("--nodes", "2", "--servers-job", "1", "rollout.engine=sglang", f"rollout.sglang.python={broken}")
    cluster.run(*TRAIN, "submit", recipe, "--site", site, *words, "--dry-run", environment=environment)
    run = recipe.parent / "runs" / "small"
    assert not list(run.glob(f"submissions/*/{SERVERS_JOB}"))
    with small_disk(cluster, "node3"):
        command = ("sbatch", "--parsable", run / "submissions/1/serve.sbatch")
        array = cluster.run(*command, environment=environment).stdout.strip()
        job = cluster.wait_for_job(f"{array}_1")
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "1", "2:0")
    log = (run / f"slurm-{job['JobId']}.log").read_text()
    assert "END failed at step 0: 1 of 1 nodes are unfit, 0 to spare: node3: /dev/shm: 1" in log
    assert "; requeued without node" in log
    assert "END mistake: gtpo-megatron: the SGLang server 0 did not start" in log.splitlines()[-1]
    assert (
        "screen node4 " in (run / "serving/2/screen.log").read_text()
    )  # fit, and servers were started there
