#!/usr/bin/env python
"""Let faults befall a training run on a real Slurm of four virtual nodes, and compare its metrics with those of a run left alone.

    tools/slurm_chaos.py                        20 faults, each kind at least once
    tools/slurm_chaos.py --faults 3 --seed 7    a short form, which the tests use

Two ranks at tensor 2, a node each, GTPO with a tiny model. A fault comes at a random moment after a new step. Checked at the end:
every step is recorded once, with the metrics of the run that was left alone, bit for bit; no process of the run is left on any
node, no lease in its directory, no job in the queue. Ends with 1 if anything does not hold. Needs root and Slurm's packages
(Debian's, installed if they are missing); every fault is listed.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from gtpo_megatron.cluster.ranks import hosts  # noqa: E402
from gtpo_megatron.cluster.record import Start, job_ids, read_starts  # noqa: E402
from gtpo_megatron.errors import UserError  # noqa: E402
from gtpo_megatron.run.directory import read_status  # noqa: E402
from gtpo_megatron.run.metrics import read_metrics  # noqa: E402
from gtpo_megatron.run.verify_resume import compare  # noqa: E402
from tests.slurm.runs import TRAIN, hold, steps, user_environment  # noqa: E402
from tests.slurm.virtual import CannotRun, VirtualSlurm, install  # noqa: E402
from tests.tiny_models import make_tiny_checkpoint  # noqa: E402

PATIENCE_S = 300.0  # for what a fault is followed by
STEPS_PER_FAULT = 4
HELD_S = 4.0  # a fault comes at most so long after a step
HUNG_AFTER_S = 10
POLL_S = 0.1


@dataclass
class Chaos:
    """A run on a virtual cluster, and what befalls it."""

    cluster: VirtualSlurm
    directory: Path
    chance: random.Random
    faults: int
    _later: list[Callable[[], None]] = field(
        default_factory=list
    )  # what is mended when the run is seen to go on

    def __post_init__(self) -> None:
        self.run = self.directory / "runs" / "wild"
        self.steps = STEPS_PER_FAULT * (self.faults + 1)
        self.environment = user_environment()
        self._write_inputs()

    def _write_inputs(self) -> None:
        prompts = self.directory / "prompts.jsonl"
        prompts.write_text("".join(f'{{"question": "{n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(64)))
        reward = {
            "kind": "python",
            "name": "characters",
            "function": "tests.training_rewards:different_characters_when_let_go",
            "options": {"hold": str(self.directory / "hold")},
        }
        recipe: dict[str, Any] = {
            "name": "wild",
            "dir": str(self.directory / "runs"),
            "model": {
                "path": str(make_tiny_checkpoint(self.directory / "model", "llama")),
                "dtype": "fp32",
            },
            "data": {"path": str(prompts), "system_prompt": "", "max_prompt_tokens": 120},
            "parallel": {"tensor": 2},
            "training": {"steps": self.steps, "micro_batch_tokens": 256},
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "rewards": {"workers": 1, "timeout_s": 600, "terms": [reward]},  # one that is held is scored
            "checkpoint": {"every": 2, "export_hf": False},
            "logging": {"tensorboard": False, "progress": "off"},
        }
        site = {
            "partition": "batch",
            "time": "02:00:00",
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "sbatch": ["--mem=1000"],
            "python": sys.executable,
            "interface": "eth0",
            "screening_s": 60,  # the nodes share this machine's cores
            "hung_after_s": HUNG_AFTER_S,
            "env": {"TMPDIR": "/dev/shm"},  # of each node alone
        }
        for name, values in (("recipe", recipe), ("site", site)):
            (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(values))

    # ---- the run ----

    def submit(self) -> str:
        """Submit the run; the job's number."""
        recipe, site = self.directory / "recipe.yaml", self.directory / "site.yaml"
        words = ("submit", recipe, "--site", site, "--nodes", "2", "--retries", "9")
        self.cluster.run(*TRAIN, *words, environment=self.environment)
        return job_ids(self.run)[-1]

    @property
    def job_id(self) -> str:
        return job_ids(self.run)[-1]

    @property
    def step(self) -> int:
        return max(steps(self.run), default=0)

    def left_alone(self) -> Path:
        """The same run without a fault, by a plain srun; its directory."""
        words = ("srun", "--nodes=2", "--ntasks=2", "--mem=1000", *TRAIN, "train")
        recipe = self.directory / "recipe.yaml"
        self.cluster.run(*words, recipe, "name=calm", environment=self.environment, timeout_s=1200)
        return self.run.with_name("calm")

    def wait(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> float:
        """Wait until something is so; the seconds that it took."""
        begun = time.monotonic()
        while not condition():
            if time.monotonic() > begun + patience_s:
                raise UserError(f"not after {patience_s:g} s: {what}; {self.cluster.job(self.job_id)}")
            time.sleep(POLL_S)
        return time.monotonic() - begun

    def let_go_to(self, step: int) -> None:
        """The run waits after this step, for the next fault at the latest."""
        hold(self.run, step)

    # ---- faults; each returns what it did, in words ----

    def rank_killed(self) -> str:
        node = self._signal_a_rank("KILL")
        return f"a rank killed on {node}"

    def rank_stopped(self) -> str:
        node = self._signal_a_rank("STOP")
        return f"a rank stopped (SIGSTOP) on {node}"

    def srun_killed(self) -> str:
        node = self._nodes()[0]
        first = self._pids(node, "srun .*gtpo_megatron train")[0]
        self.cluster.run("kill", "-KILL", first, node=node, check=False)
        return "srun of the ranks killed"

    def power_cut(self) -> str:
        """Of any of the job's nodes; back when the job has left it."""
        node, restarts = self.chance.choice(self._nodes()), self.cluster.job(self.job_id)["Restarts"]
        self.cluster.cut_power(node)
        self.wait(lambda: self.cluster.job(self.job_id)["Restarts"] != restarts, f"Slurm misses {node}")
        self.cluster.power_on(node)
        return f"power of {node} cut"

    def requeued(self) -> str:
        self.cluster.run("scontrol", "requeue", self.job_id)
        return "requeued (scontrol)"

    def asked_to_stop(self) -> str:
        self._pids(self._nodes()[0], "gtpo_megatron train")
        self.cluster.run("scancel", "--signal=USR1", self.job_id)
        return "asked to save and stop (SIGUSR1)"

    def preempted(self) -> str:
        words = (
            "--parsable",
            "--partition=urgent",
            "--nodes=4",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        )
        urgent = self.cluster.run("sbatch", *words, environment=self.environment).stdout.strip()
        self._let_end()
        self.cluster.wait_for_job(urgent, PATIENCE_S)
        return "preempted by a job of higher priority"

    def cancelled(self) -> str:
        job_id = self.job_id
        self.cluster.run("scancel", job_id)
        self._let_end()
        self.cluster.wait_for_job(job_id, PATIENCE_S)
        self.submit()
        return "cancelled (scancel), and submitted again"

    def second_job(self) -> str:
        """Another job of the same run, which has to leave it alone."""
        first, second = self.job_id, self.submit()
        job = self.cluster.wait_for_job(second, PATIENCE_S)
        newest = self.run / "submissions" / str(len(job_ids(self.run)))
        shutil.rmtree(newest)  # the run's own job is the newest again
        if (job["JobState"], job["ExitCode"]) != ("FAILED", "2:0") or self.job_id != first:
            raise UserError(f"a second job of the run was not refused: {job}")
        return "a second job of the same run, refused"

    def node_unfit(self) -> str:
        """A node of the job has no disk left when the job is requeued."""
        node = self.chance.choice(self._nodes())
        self.cluster.run("mount", "-o", "remount,size=64m", "/dev/shm", node=node)
        self._later.append(lambda: self.cluster.run("mount", "-o", "remount,size=50%", "/dev/shm", node=node))
        self.cluster.run("scontrol", "requeue", self.job_id)
        # what hung before comes back, as an operator does it: else there may be too few nodes without this one
        words = ("scontrol", "update", f"jobid={self.job_id}", "excnodelist=")
        self.wait(lambda: self.cluster.run(*words, check=False).returncode == 0, "nodes given back")
        return f"disk of {node} full, and requeued"

    def _nodes(self) -> list[str]:
        """Of the run's job, once its ranks are there."""
        return hosts(self.cluster.job(self.job_id)["NodeList"])

    def _signal_a_rank(self, name: str) -> str:
        node = self.chance.choice(self._nodes())
        rank = self._pids(node, "gtpo_megatron train")[-1]  # the newest: srun has the same words
        self.cluster.run("kill", f"-{name}", rank, node=node, check=False)
        return node

    def _pids(self, node: str, pattern: str) -> list[str]:
        found: list[str] = []

        def look() -> bool:
            found[:] = self.cluster.run("pgrep", "-f", pattern, node=node, check=False).stdout.split()
            return bool(found)

        self.wait(look, f"a process '{pattern}' on {node}")
        return found

    def _let_end(self) -> None:
        """What waits for the next fault is let go to finish its step."""
        self.let_go_to(self.steps)

    # ---- the course of it ----

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

    def befall(self, number: int, kind: str) -> None:
        """A step, a fault after it, and the first step of the start that follows."""
        before = self.step
        self.let_go_to(before + 2)
        self.wait(lambda: self.step > before, "a step before the fault")
        time.sleep(self.chance.uniform(0.0, HELD_S))
        self.wait_for_ranks()
        step, begun, starts = self.step, time.monotonic(), (self.job_id, len(self.starts()))
        what = FAULTS[kind](self)
        self.let_go_to(step + 1)
        if kind != "second job":
            self.wait(lambda: (self.job_id, len(self.starts())) != starts, f"a start after: {what}")
            self.wait_for_ranks()
        step_after = self.step
        self.let_go_to(step_after + 1)
        self.wait(lambda: self.step > step_after, f"a step after: {what}")
        while self._later:
            self._later.pop()()
        took = time.monotonic() - begun
        typer.echo(f"fault {number} at step {step}: {what}; next step after {took:.0f} s")

    def violations(self, calm: Path) -> list[str]:
        """What should hold at the end, and does not."""
        found = []
        rows = read_metrics(self.run / "metrics.jsonl")
        if [row["step"] for row in rows] != list(range(1, self.steps + 1)):
            found.append("steps are not recorded once each")
        report = compare(read_metrics(calm / "metrics.jsonl"), rows, ranks=2)
        found += [str(difference) for difference in report.differences[:10]]
        typer.echo(
            f"{report.compared} metric values of {report.steps} steps compared, {len(report.differences)} differ"
        )
        status = read_status(self.run)
        if (status.state, status.step) != ("complete", self.steps):
            found.append(f"the run's status: {status}")
        found += [f"left in the run's directory: {path.name}" for path in self.run.glob("*lease*")]
        found += [f"left in the run's directory: {path.name}" for path in self.run.glob(".*lease*")]
        for node in self.cluster.nodes:
            shown = self.cluster.run("pgrep", "-af", "gtpo_megatron|slurm_script", node=node, check=False)
            found += [f"left on {node}: {line}" for line in shown.stdout.splitlines()]
        queue = self.cluster.run("squeue", "--noheader").stdout
        found += [f"left in the queue: {line}" for line in queue.splitlines()]
        return found


FAULTS: dict[str, Callable[[Chaos], str]] = {
    "rank killed": Chaos.rank_killed,
    "rank stopped": Chaos.rank_stopped,
    "srun killed": Chaos.srun_killed,
    "power cut": Chaos.power_cut,
    "requeued": Chaos.requeued,
    "asked to stop": Chaos.asked_to_stop,
    "preempted": Chaos.preempted,
    "cancelled": Chaos.cancelled,
    "second job": Chaos.second_job,
    "node unfit": Chaos.node_unfit,
}


def kinds(number: int, chance: random.Random) -> list[str]:
    """Every kind at least once, where there are as many faults."""
    chosen = [*chance.sample(list(FAULTS), len(FAULTS)), *chance.choices(list(FAULTS), k=number)][:number]
    chance.shuffle(chosen)
    return chosen


def main(
    faults: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[
        int | None, typer.Option(help="Of faults and moments; default: another one each time")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep the runs for a look")] = False,
) -> None:
    """Let faults befall a training run on a virtual Slurm, and compare its metrics with an undisturbed one's."""
    install()
    seed = random.randrange(1 << 30) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="slurm-chaos-"))
    typer.echo(f"seed {seed}, {faults} faults, in {directory}")
    begun = time.monotonic()
    try:
        chance = random.Random(seed)
        (directory / "cluster").mkdir()
        with VirtualSlurm(directory / "cluster") as cluster:
            chaos = Chaos(cluster, directory, chance, faults)
            calm = chaos.left_alone()
            typer.echo(f"left alone: {chaos.steps} steps in {time.monotonic() - begun:.0f} s")
            chaos.run.mkdir(parents=True)
            chaos.let_go_to(STEPS_PER_FAULT)
            chaos.submit()
            happened = kinds(faults, chance)
            for number, kind in enumerate(happened, 1):
                chaos.befall(number, kind)
            (directory / "hold").unlink()
            job = cluster.wait_for_job(chaos.job_id, PATIENCE_S)
            found = chaos.violations(calm)
            if job["JobState"] != "COMPLETED":
                found.append(f"the job ended as {job['JobState']}")
            starts = len(read_starts(chaos.run))
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    counted = ", ".join(f"{count} {kind}" for kind, count in Counter(happened).items())
    typer.echo(f"{faults} faults: {counted}")
    for line in found:
        typer.echo(f"VIOLATION {line}")
    minutes = (time.monotonic() - begun) / 60
    typer.echo(f"{starts} starts of the run in {minutes:.0f} minutes; {len(found)} violations")
    raise typer.Exit(int(bool(found)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, CannotRun) as error:
        sys.exit(f"error: {error}")
