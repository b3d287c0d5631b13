"""What a person must mend ends the job with one clear line, and is not requeued."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo_megatron.errors import MISTAKE
from tests.slurm.runs import TRAIN, change, last_line
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
LISTEN = (
    "import socket, sys; s = socket.create_server(('', {port})); print('up', flush=True); sys.stdin.read()"
)
PORT = 23456


def mistake(cluster: VirtualSlurm, run: Path, job_id: str) -> str:
    """The last line of a job that ended as one."""
    job = cluster.wait_for_job(job_id)
    line = last_line(run, job_id)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", f"{MISTAKE}:0"), line
    return line.partition(" END ")[2]


def test_an_allocation_too_small_for_the_layout(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> None:
    """As a person asks for it, who submits what was written for two nodes."""
    run = recipe.parent / "runs" / "small"
    written = (*TRAIN, "submit", recipe, "--site", site, "--nodes", "2", "--dry-run")
    cluster.run(*written, environment=environment)
    command = ("sbatch", "--parsable", "--nodes=1", run / "submissions" / "1" / "train.sbatch")
    line = mistake(cluster, run, cluster.run(*command, environment=environment).stdout.strip())
    assert line.startswith("mistake: gtpo-megatron: the world has 1 rank, not a multiple of parallel.tensor")


def test_a_module_that_is_not_there(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    change(site, modules=["cuda/99.9"])
    line = mistake(cluster, recipe.parent / "runs" / "small", submit("small"))
    assert line.startswith("mistake: module load cuda/99.9 failed on node1: ")


@pytest.mark.soak
def test_a_port_that_another_program_has(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    change(site, env={"MASTER_PORT": PORT})
    with cluster.process(sys.executable, "-c", LISTEN.format(port=PORT), node="node1"):
        line = mistake(cluster, recipe.parent / "runs" / "small", submit("small"))
    assert line.startswith(f"mistake: gtpo-megatron: MASTER_PORT={PORT}: another program on this machine")


def test_nodes_without_the_gpus_that_slurm_promises(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    change(site, screening_s=60, gpus_per_node=1, env={"TMPDIR": "/dev/shm"})
    run = recipe.parent / "runs" / "small"
    line = mistake(cluster, run, submit("small", "--nodes", "2"))
    assert line.startswith(
        "mistake: 2 of 2 nodes are unfit, 0 to spare: node1: 1 GPUs are allocated, 0 answer"
    )
    assert not (run / "attempts" / "ended").exists()  # no rank has been started
