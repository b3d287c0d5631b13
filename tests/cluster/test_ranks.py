"""Ranks from Slurm's variables, as they were seen on a real Slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gtpo_megatron.cluster.ranks import PORTS, hosts, join_step, tasks_per_node, world_of_step
from gtpo_megatron.errors import STOPPED, UserError

ROOT = Path(__file__).parents[2]

# of the second task on the second of two nodes, two tasks each: srun's
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[09-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# of the script that calls srun: also a SLURM_PROCID
BATCH = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    world = world_of_step(STEP)
    assert int(world.pop("MASTER_PORT")) in PORTS
    assert world == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node09",
    }


def test_nodes_may_have_different_counts() -> None:
    last = STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}
    assert world_of_step(last)["LOCAL_WORLD_SIZE"] == "1"
    first = last | {"SLURM_NODEID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
    assert world_of_step(first)["LOCAL_WORLD_SIZE"] == "3"


def test_two_steps_of_a_job_have_ports_of_their_own() -> None:
    ports = {
        world_of_step(STEP | {"SLURM_STEP_ID": step, "SLURM_JOB_ID": job})["MASTER_PORT"]
        for step in "012"
        for job in ("41", "42")
    }
    assert len(ports) == 6


def test_a_chosen_address_is_kept() -> None:
    world = world_of_step(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"})
    assert (world["MASTER_ADDR"], world["MASTER_PORT"]) == ("10.0.0.9", "29500")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        STEP | {"TORCHELASTIC_RUN_ID": "none", "RANK": "7", "WORLD_SIZE": "8"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        # a shell in an allocation of 8, which is a step of one task with the job's SLURM_NTASKS
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS": "8"},
    ],
    ids=["no Slurm", "batch script", "torchrun in a step", "torchrun", "interactive step"],
)
def test_no_rank_is_taken_from_slurm(environ: dict[str, str]) -> None:
    assert world_of_step(environ) == {}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4: a number from 0 to 3"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many: a number of 1 or more"),
        ({"SLURM_STEP_NODELIST": "node[09-11]"}, "SLURM_STEP_NODELIST"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x1)"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE=two"),
        ({"RANK": "0"}, "RANK=0 is set, but this is RANK 3"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "WORLD_SIZE=1"),
    ],
)
def test_a_contradiction_is_refused(change: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("(", r"\(").replace("[", r"\[")):
        world_of_step(STEP | change)


def test_agreeing_variables_of_the_script_do_no_harm() -> None:
    assert world_of_step(STEP | {"WORLD_SIZE": "4"}) == world_of_step(STEP)


def test_what_is_taken_stays_when_taken_again() -> None:
    environ = dict(STEP)
    environ.update(world_of_step(environ))
    assert world_of_step(environ) == world_of_step(STEP)


def test_outside_a_step_nothing_changes() -> None:
    environ, before = dict(BATCH), signal.getsignal(signal.SIGUSR1)
    join_step(environ)
    assert environ == BATCH and signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_task_that_is_asked_to_stop_before_it_has_begun_ends_as_stopped(number: int) -> None:
    code = (
        "import os, sys; from gtpo_megatron.cluster.ranks import join_step; join_step(os.environ); "
        "assert os.environ['RANK'] == '3'; os.kill(os.getpid(), int(sys.argv[1])); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], env=os.environ | STEP, cwd=ROOT)
    assert done.returncode == STOPPED


@pytest.mark.parametrize(
    "short, long",
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[01,3]", ["r1n01", "r1n3", "r2n01", "r2n3"]),
        ("a-b[1-2]-ib,c", ["a-b1-ib", "a-b2-ib", "c"]),
    ],
)
def test_hosts(short: str, long: list[str]) -> None:
    assert hosts(short) == long


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
