"""A run on a virtual Slurm and the faults that befall it, of which tools/slurm_chaos.py makes a course."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gtpo_megatron.cluster.ranks import hosts
from gtpo_megatron.cluster.record import SERVERS, SERVERS_JOB, Start, job_ids, read_starts
from gtpo_megatron.errors import UserError
from gtpo_megatron.registry import registered
from gtpo_megatron.run.directory import read_status
from tests.slurm.runs import TRAIN, hold, steps, user_environment
from tests.slurm.virtual import VirtualSlurm

PATIENCE_S = 500.0  # for what a fault is followed by; a server starts for minutes on a busy machine
POLL_S = 0.1
RANKS, KEEPER, SERVER = "gtpo_megatron train", "gtpo_megatron serve", "sglang::scheduler"


@dataclass
class Victim:
    """A run on a virtual cluster, and how it is looked at."""

    cluster: VirtualSlurm
    directory: Path  # of recipe.yaml, site.yaml and the runs
    name: str
    steps: int
    chance: random.Random
    words: tuple[str, ...] = ()  # of submit, and key=value
    later: list[Callable[[], None]] = field(
        default_factory=list
    )  # to be mended when the run is seen to go on

    def __post_init__(self) -> None:
        self.run = self.directory / "runs" / self.name
        self.environment = user_environment()

    def submit(self) -> str:
        """Submit the run; the job's number."""
        recipe, site = self.directory / "recipe.yaml", self.directory / "site.yaml"
        words = ("submit", recipe, "--site", site, "--nodes", "2", "--retries", "9", f"name={self.name}")
        self.cluster.run(*TRAIN, *words, *self.words, environment=self.environment)
        return self.job_id

    @property
    def job_id(self) -> str:
        return job_ids(self.run)[-1]

    @property
    def servers_job(self) -> str:
        """The one element of the array."""
        return f"{job_ids(self.run, SERVERS_JOB)[-1]}_1"

    @property
    def step(self) -> int:
        return max(steps(self.run), default=0)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise UserError(f"not after {PATIENCE_S:g} s: {what}; {self.cluster.job(self.job_id)}")
            time.sleep(POLL_S)

    def let_go_to(self, step: int) -> None:
        """The run waits after this step, for the next fault at the latest."""
        hold(self.run, step)

    def let_end(self) -> None:
        """What waits for the next fault is let go to finish its step."""
        self.let_go_to(self.steps)

    def starts(self) -> list[Start]:
        """Of the run by its own job, the one that a second job of the run does not count in."""
        return [start for start in read_starts(self.run) if start.job_id == self.job_id]

    def wait_for_ranks(self) -> None:
        """Until the run's job runs, and its ranks have taken the directory."""

        def going_on() -> bool:
            starts = self.starts()
            running = self.cluster.job(self.job_id)["JobState"] == "RUNNING"
            return running and bool(starts) and starts[-1].ended is None and self._status_is_running()

        self.wait(going_on, "the run's job runs")

    def _status_is_running(self) -> bool:
        try:
            status = read_status(self.run)
        except UserError:
            return False
        return status.state == "running" and status.job_id == self.job_id

    def nodes(self) -> list[str]:
        """Of the run's job, once its ranks are there."""
        return hosts(self.cluster.job(self.job_id)["NodeList"])

    def pids(self, node: str, pattern: str) -> list[str]:
        """Of such processes of a node, the oldest first, once there are some."""
        found: list[str] = []

        def look() -> bool:
            found[:] = self.cluster.run("pgrep", "-f", pattern, node=node, check=False).stdout.split()
            return bool(found)

        self.wait(look, f"a process '{pattern}' on {node}")
        return found

    def signal(self, name: str, node: str, pattern: str) -> None:
        """To the newest such process: srun has the same words as what it starts."""
        self.cluster.run("kill", f"-{name}", self.pids(node, pattern)[-1], node=node, check=False)

    def cut_power(self, node: str, job_id: str) -> None:
        """Until the job has left the node."""
        restarts = self.cluster.job(job_id)["Restarts"]
        self.cluster.cut_power(node)
        self.wait(lambda: self.cluster.job(job_id)["Restarts"] != restarts, f"Slurm misses {node}")
        self.cluster.power_on(node)

    def server(self) -> tuple[str, float]:
        """The node of the server that is up, and since when."""
        self.wait(lambda: registered(self.run / SERVERS), "a server is up")
        newest = max(registered(self.run / SERVERS), key=lambda server: server.since)
        return newest.host, newest.since


# ---- faults; each returns what it did, in words ----


def rank_killed(of: Victim) -> str:
    node = of.chance.choice(of.nodes())
    of.signal("KILL", node, RANKS)
    return f"a rank killed on {node}"


def rank_stopped(of: Victim) -> str:
    node = of.chance.choice(of.nodes())
    of.signal("STOP", node, RANKS)
    return f"a rank stopped (SIGSTOP) on {node}"


def srun_killed(of: Victim) -> str:
    node = of.nodes()[0]
    first = of.pids(node, f"srun .*{RANKS}")[0]
    of.cluster.run("kill", "-KILL", first, node=node, check=False)
    return "srun of the ranks killed"


def power_cut(of: Victim) -> str:
    """Of any of the job's nodes; back when the job has left it."""
    node = of.chance.choice(of.nodes())
    of.cut_power(node, of.job_id)
    return f"power of {node} cut"


def requeued(of: Victim) -> str:
    of.cluster.run("scontrol", "requeue", of.job_id)
    return "requeued (scontrol)"


def asked_to_stop(of: Victim) -> str:
    of.pids(of.nodes()[0], RANKS)
    of.cluster.run("scancel", "--signal=USR1", of.job_id)
    return "asked to save and stop (SIGUSR1)"


def preempted(of: Victim) -> str:
    words = (
        "--parsable",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    )
    urgent = of.cluster.run("sbatch", *words, environment=of.environment).stdout.strip()
    of.let_end()
    of.cluster.wait_for_job(urgent, PATIENCE_S)
    return "preempted by a job of higher priority"


def cancelled(of: Victim) -> str:
    job_id = of.job_id
    of.cluster.run("scancel", job_id)
    of.let_end()
    of.cluster.wait_for_job(job_id, PATIENCE_S)
    of.submit()
    return "cancelled (scancel), and submitted again"


def second_job(of: Victim) -> str:
    """Another job of the same run, which has to leave it alone."""
    first, second = of.job_id, of.submit()
    job = of.cluster.wait_for_job(second, PATIENCE_S)
    newest = of.run / "submissions" / str(len(job_ids(of.run)))
    shutil.rmtree(newest)  # the run's own job is the newest again
    if (job["JobState"], job["ExitCode"]) != ("FAILED", "2:0") or of.job_id != first:
        raise UserError(f"a second job of the run was not refused: {job}")
    return "a second job of the same run, refused"


def node_unfit(of: Victim) -> str:
    """A node of the job has no disk left when the job is requeued."""
    node = of.chance.choice(of.nodes())
    of.cluster.run("mount", "-o", "remount,size=64m", "/dev/shm", node=node)
    of.later.append(lambda: of.cluster.run("mount", "-o", "remount,size=50%", "/dev/shm", node=node))
    of.cluster.run("scontrol", "requeue", of.job_id)
    # what hung before comes back, as an operator does it: else there may be too few nodes without this one
    words = ("scontrol", "update", f"jobid={of.job_id}", "excnodelist=")
    of.wait(lambda: of.cluster.run(*words, check=False).returncode == 0, "nodes given back")
    return f"disk of {node} full, and requeued"


def server_killed(of: Victim) -> str:
    """What keeps the server starts it again."""
    node, _ = of.server()
    of.signal("KILL", node, SERVER)
    return f"the SGLang server on {node} killed"


def server_step_killed(of: Victim) -> str:
    """The task that keeps the server, which ends with it: the job of servers is requeued by its script."""
    node, _ = of.server()
    of.signal("KILL", node, KEEPER)
    return f"the step of the server on {node} killed"


def server_job_requeued(of: Victim) -> str:
    of.server()
    of.cluster.run("scontrol", "requeue", of.servers_job)
    return "the job of the server requeued, as for a better use of its node"


def server_power_cut(of: Victim) -> str:
    node, _ = of.server()
    of.cut_power(node, of.servers_job)
    return f"power of {node}, which serves, cut"


@dataclass(frozen=True)
class Fault:
    """What befalls a run, and by what one sees that it is over."""

    do: Callable[[Victim], str]
    followed_by: str = (
        "start"  # of the run's job; "server": one that is up since; "": a step of the run is enough
    )


FAULTS = {
    "rank killed": Fault(rank_killed),
    "rank stopped": Fault(rank_stopped),
    "srun killed": Fault(srun_killed),
    "power cut": Fault(power_cut),
    "requeued": Fault(requeued),
    "asked to stop": Fault(asked_to_stop),
    "preempted": Fault(preempted),
    "cancelled": Fault(cancelled),
    "second job": Fault(second_job, ""),
    "node unfit": Fault(node_unfit),
}
SERVER_FAULTS = {
    "server killed": Fault(server_killed, "server"),
    "server's step killed": Fault(server_step_killed, "server"),
    "server's job requeued": Fault(server_job_requeued, "server"),
    "power of the server's node cut": Fault(server_power_cut, "server"),
    "rank killed": Fault(rank_killed),
}


def befall(of: Victim, fault: Fault, held_s: float) -> tuple[int, str, float]:
    """A step, a fault after it, and a step after what follows; the step, what was done, and the seconds until that last step.

    The fault comes at a random moment of `held_s` seconds after the first step.
    """
    before = of.step
    of.let_go_to(before + 2)
    of.wait(lambda: of.step > before, "a step before the fault")
    time.sleep(of.chance.uniform(0.0, held_s))
    of.wait_for_ranks()
    step, starts = of.step, (of.job_id, len(of.starts()))
    since = of.server()[1] if fault.followed_by == "server" else 0.0
    begun = time.monotonic()
    what = fault.do(of)
    of.let_go_to(step + 1)
    if fault.followed_by == "start":
        of.wait(lambda: (of.job_id, len(of.starts())) != starts, f"a start after: {what}")
        of.wait_for_ranks()
    elif fault.followed_by == "server":
        of.wait(lambda: of.server()[1] > since, f"a server after: {what}")
    step_after = of.step
    of.let_go_to(step_after + 1)
    of.wait(lambda: of.step > step_after, f"a step after: {what}")
    took = time.monotonic() - begun
    while of.later:
        of.later.pop()()
    return step, what, took


def left_behind(of: Victim) -> list[str]:
    """What there is of a run that should have ended."""
    found = [f"left in the run's directory: {path.name}" for path in of.run.glob("*lease*")]
    found += [f"left in the run's directory: {path.name}" for path in of.run.glob(".*lease*")]
    for node in of.cluster.nodes:
        shown = of.cluster.run("pgrep", "-af", "gtpo_megatron|slurm_script|sglang", node=node, check=False)
        found += [f"left on {node}: {line}" for line in shown.stdout.splitlines()]
    queue = of.cluster.run("squeue", "--noheader").stdout
    return found + [f"left in the queue: {line}" for line in queue.splitlines()]
