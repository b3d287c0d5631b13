#!/usr/bin/env python
"""Train with SGLang servers while servers, router and trainer are killed and stopped at random; show that nothing is lost.

    tools/soak.py                        40 faults, every batch sampled with the weights that it trains
    tools/soak.py --staleness 1          sampling ahead; completions go on after updates and in the next batch
    tools/soak.py --faults 4 --seed 16   a short form; the tests use it, sampling ahead

Checked at the end: every step is recorded once; every batch is whole; no prompt was trained on twice or passed over; the
certificates held; and, on policy, no token has another probability than the trainer's weights give it, so that none came
from a server that missed an update. Ends with 1 if anything does not hold. Needs `make sglang`; every fault is listed.
"""

import math
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from chaos import tiny_run

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import save_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.run.verify_resume import Training, last_step
from gtpo_megatron.trajectories.store import TrajectoryStore

PROMPTS, GROUP_SIZE, OVERSAMPLE = 2, 4, 1.5
CALM_STEPS = 3  # after the last fault
PATIENCE_S = 900.0  # for a step, after a fault
POLL_S = 0.05
KINDS = {  # how often, in proportion
    "scheduler killed": 3,
    "server killed": 3,
    "server stopped for a while": 4,
    "server hung for good": 1,
    "router killed": 3,
    "trainer killed": 2,
}
PROCESSES = {
    "scheduler": "sglang::scheduler",
    "server": "sglang.launch_server",
    "router": "sglang::router",
}


@dataclass(frozen=True)
class Usage:
    """What a trainer holds."""

    step: int
    rss_mib: float
    files: int  # open descriptors, sockets included
    threads: int


class Soak:
    """A training run, and what befalls it."""

    def __init__(self, config: RunConfig, recipe: Path, seed: int) -> None:
        self.config = config
        self.chance = random.Random(seed)
        self.lives: list[list[Usage]] = []  # of every trainer, at the steps that it was seen at
        self._recipe = recipe
        self._metrics = config.path / "metrics.jsonl"
        self._start_trainer()

    @property
    def step(self) -> int:
        """Steps recorded."""
        return last_step(self._metrics)

    def wait_for_step(self, step: int) -> float:
        """Wait until so many steps are recorded; returns the seconds that it took. Notes the trainer's memory meanwhile."""
        begun = time.monotonic()
        while self.step < step:
            if not self.training.running:
                self.training.finish()  # says why
                raise UserError("the trainer ended by itself")
            if time.monotonic() > begun + PATIENCE_S:
                raise UserError(f"no step for {PATIENCE_S:g} s; logs in {self.config.path / 'logs'}")
            time.sleep(POLL_S)
        self._note_usage()
        return time.monotonic() - begun

    def fault(self, kind: str) -> str:
        """Do it; returns what was done, in words."""
        if kind == "trainer killed":
            self.training.kill()
            self._start_trainer()
            return kind
        victim = self._find(PROCESSES[kind.split()[0]])
        if kind.endswith("killed"):
            victim.kill()
            return kind
        family = [victim, *victim.children(recursive=True)]
        _signal(family, signal.SIGSTOP)
        if kind == "server hung for good":
            return kind
        seconds = self.chance.uniform(1.0, 40.0)
        threading.Timer(seconds, _signal, (family, signal.SIGCONT)).start()
        return f"server stopped for {seconds:.0f} s"

    def _start_trainer(self) -> None:
        self.training = Training(self._recipe)
        self.lives.append([])

    def _find(self, name: str) -> psutil.Process:
        """One of the trainer's processes of this name, waiting until there is one that runs."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.training.running:
            family = psutil.Process(self.training.pid).children(recursive=True)
            if found := [p for p in family if _has_name(p, name)]:
                return self.chance.choice(found)
            time.sleep(POLL_S)
        raise UserError(f"the trainer has no process {name}")

    def _note_usage(self) -> None:
        try:
            trainer = psutil.Process(self.training.pid)
            rss = trainer.memory_info().rss / 2**20
            self.lives[-1].append(Usage(self.step, rss, trainer.num_fds(), trainer.num_threads()))
        except psutil.NoSuchProcess:
            pass


def _has_name(process: psutil.Process, name: str) -> bool:
    try:
        command = " ".join(process.cmdline())
        return name in command and "watchdog" not in command and process.status() != psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def run_faults(soak: Soak, number: int) -> Counter[str]:
    """Let `number` faults befall the run, most of them after a step since the last, some in the middle of recovery."""
    typer.echo(f"first step after {soak.wait_for_step(1):.0f} s")
    soak.wait_for_step(CALM_STEPS)
    kinds = [*KINDS, *soak.chance.choices(list(KINDS), list(KINDS.values()), k=max(number - len(KINDS), 0))]
    soak.chance.shuffle(kinds)
    for count, kind in enumerate(kinds[:number], 1):
        step = soak.step
        what = soak.fault(kind)
        at_once = soak.chance.random() < 0.25 and count < number
        # a server that fails in its first start ends the run with a message
        if at_once and kind != "trainer killed":
            time.sleep(soak.chance.uniform(0.0, 10.0))
            typer.echo(f"fault {count} at step {step}: {what}; the next at once")
            continue
        took = soak.wait_for_step(step + 1)
        typer.echo(f"fault {count} at step {step}: {what}; next step after {took:.0f} s")
        time.sleep(soak.chance.uniform(0.0, 10.0))
    soak.wait_for_step(soak.step + CALM_STEPS)
    soak.training.stop()
    return Counter(kinds[:number])


def violations(config: RunConfig) -> list[str]:
    """What should hold of the run's metrics and batches, and does not."""
    rows = read_metrics(config.path / "metrics.jsonl")
    steps = len(rows)
    found = []

    def check(holds: bool, what: str) -> None:
        if not holds:
            found.append(what)

    check([row["step"] for row in rows] == list(range(1, steps + 1)), "steps are not recorded once each")
    store = TrajectoryStore(config.path / "trajectories")
    trained: list[int] = []
    for step, row in enumerate(rows):
        batch = store.read(step)
        check(
            sorted((t.group, t.index) for t in batch) == [(g, i) for g in range(PROMPTS) for i in range(GROUP_SIZE)],
            f"batch {step} is not whole",
        )  # fmt: skip
        versions = {int(v) for t in batch for v in t.token_versions}
        check(max(versions) <= step, f"batch {step} has tokens of weights {max(versions)}")
        check(
            row["mismatch/mean_abs"] < 1e-4,
            f"step {step + 1}: mismatch/mean_abs {row['mismatch/mean_abs']:g}",
        )
        if not config.rollout.staleness:
            check(versions == {step}, f"batch {step} has tokens of weights {sorted(versions)}")
            check(
                row["logprob_gap/max"] < 1e-3,
                f"step {step + 1}: a token's logprob is off by {row['logprob_gap/max']:g}",
            )
        trained += [int(t.prompt_id) for t in batch if t.index == 0]
    twice = [prompt for prompt, times in Counter(trained).items() if times > 1]
    check(not twice, f"prompts trained on twice: {sorted(twice)[:10]}")
    missing = sorted(set(range(max(trained))) - set(trained))
    on_the_way = math.ceil(PROMPTS * config.rollout.oversample) * (1 + config.rollout.staleness)
    check(
        len(missing) <= on_the_way,
        f"{len(missing)} prompts passed over, at most {on_the_way} were on their way: {missing}",
    )
    return found


def soak_config(directory: Path, staleness: int) -> RunConfig:
    """Sums whose ids are their order, a tiny model, two servers and a router."""
    tiny = tiny_run(directory, 1_000_000)
    Path(tiny.data.path).write_text(
        "".join(f'{{"id": "{i}", "question": "{i} + 5 =", "answer": "{i + 5}"}}\n' for i in range(50_000))
    )
    values = tiny.model_dump(mode="json")
    values |= {
        "name": "soak",
        "checkpoint": values["checkpoint"] | {"every": 4, "keep_last": 2, "export_hf": False},
    }
    values["data"] |= {"shuffle": False, "fields": {"id": "id"}}
    values["training"] |= {"micro_batch_tokens": 1024}
    values["logging"] |= {"tensorboard": False, "progress": "plain"}
    values["rollout"] |= {
        "engine": "sglang",
        "prompts_per_step": PROMPTS,
        "group_size": GROUP_SIZE,
        "max_new_tokens": 64,
        "oversample": OVERSAMPLE,
        "staleness": staleness,
        "sglang": {
            "servers": 2,
            "router": True,
            "verify_every": 5,
            "checksums": "certificate",
            "partial": staleness > 0,
            "concurrency": 8,
            "start_timeout_s": 150.0,
        },
    }
    if staleness:
        values["algorithm"] |= {"importance": {"level": "token", "cap": 2.0}}
    return RunConfig.model_validate(values)


def main(
    faults: Annotated[int, typer.Option(min=1)] = 40,
    staleness: Annotated[int, typer.Option(min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the faults; default: another one each time")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the run for a look")] = False,
) -> None:
    """Train while servers, router and trainer are killed and stopped; check that nothing is lost."""
    seed = random.randrange(1 << 30) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    typer.echo(f"seed {seed}, {faults} faults, staleness {staleness}, in {directory}")
    config = soak_config(directory, staleness)
    save_config(config, directory / "soak.yaml")
    begun = time.monotonic()
    # through the `finally`, which ends the trainer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    soak = Soak(config, directory / "soak.yaml", seed)
    try:
        count = run_faults(soak, faults)
        steps, wrong = soak.step, violations(config)
    except UserError:
        keep = True
        raise
    finally:
        soak.training.kill()
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    typer.echo(f"{faults} faults: {', '.join(f'{n} {kind}' for kind, n in count.items())}")
    longest = max(soak.lives, key=len)
    first, last = longest[0], longest[-1]
    typer.echo(
        f"the trainer that lived longest, steps {first.step} to {last.step}: memory {first.rss_mib:.0f} -> "
        f"{last.rss_mib:.0f} MiB, open files {first.files} -> {last.files}, threads {first.threads} -> {last.threads}"
    )
    for line in wrong[:20]:
        typer.echo(f"VIOLATED {line}")
    typer.echo(f"{steps} steps in {(time.monotonic() - begun) / 60:.0f} minutes; {len(wrong)} violations")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
