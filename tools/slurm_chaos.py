#!/usr/bin/env python
"""Let faults befall training runs on a real Slurm of four virtual nodes, and check what they come to.

    tools/slurm_chaos.py                        20 faults, each kind at least once; then 6 in a run with a real SGLang server
    tools/slurm_chaos.py --faults 3 --seed 7 --server-faults 0     a short form, which the tests use

Two ranks at tensor 2, a node each, GTPO with a tiny model. A fault comes at a random moment after a new step. The first run samples
by itself: every step is recorded once, with the metrics of a run that was left alone, bit for bit. The second samples by a server
in a job of its own, whose tokens are not the same from run to run: every step is recorded once, and the server and the trainer
agree at each (rollout.sglang.verify_every=1). Of neither is anything left: no process on any node, no lease in its directory, no job in
the queue. Ends with 1 if anything does not hold. Needs root and Slurm's packages (Debian's, installed if they are missing),
and SGLang's environment (`make sglang`); every fault is listed.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from gtpo_megatron.cluster.record import read_starts  # noqa: E402
from gtpo_megatron.errors import UserError  # noqa: E402
from gtpo_megatron.run.directory import read_status  # noqa: E402
from gtpo_megatron.run.metrics import read_metrics  # noqa: E402
from gtpo_megatron.run.verify_resume import compare  # noqa: E402
from tests.slurm.runs import (  # noqa: E402
    TRAIN,
    small_recipe,
    user_environment,
    virtual_site,
    write_yaml,
    wrong_with_served,
)
from tests.slurm.virtual import CannotRun, VirtualSlurm, install  # noqa: E402
from tests.tiny_models import make_tiny_checkpoint  # noqa: E402
from tools.slurm_faults import (  # noqa: E402
    FAULTS,
    PATIENCE_S,
    SERVER_FAULTS,
    Fault,
    Victim,
    befall,
    left_behind,
)

STEPS_PER_FAULT = 4
HELD_S = 4.0  # a fault comes at most so long after a step
HUNG_AFTER_S = 10
SGLANG = REPOSITORY / ".venv-sglang" / "bin" / "python"


def write_inputs(directory: Path) -> None:
    """The recipe of both runs, and the site."""
    checkpoint = make_tiny_checkpoint(directory / "model", "llama")
    recipe = small_recipe(directory, "wild", checkpoint)
    recipe["optimizer"]["lr"] = 1e-3  # for many steps
    recipe["checkpoint"]["every"] = 2
    write_yaml(directory / "recipe.yaml", recipe)
    site: dict[str, Any] = {
        "screening_s": 60,  # the nodes share this machine's cores
        "hung_after_s": HUNG_AFTER_S,
        "env": {"TMPDIR": "/dev/shm"},  # of each node alone
        "sbatch_servers": ["--nodelist=node4"],  # the last to be given to ranks
    }
    write_yaml(directory / "site.yaml", virtual_site() | site)


def left_alone(cluster: VirtualSlurm, directory: Path, steps: int) -> Path:
    """The same run without a fault, by a plain srun; its directory."""
    words = ("srun", "--nodes=2", "--ntasks=2", "--mem=1000", *TRAIN, "train", directory / "recipe.yaml")
    settings = ("name=calm", f"training.steps={steps}")
    cluster.run(*words, *settings, environment=user_environment(), timeout_s=3600)
    return directory / "runs" / "calm"


def course(victim: Victim, faults: dict[str, Fault], chosen: Collection[str]) -> list[str]:
    """A run from its submission to its end, with faults; what does not hold of it, whatever it samples with."""
    victim.run.mkdir(parents=True)
    victim.let_go_to(STEPS_PER_FAULT)
    victim.submit()
    for number, kind in enumerate(chosen, 1):
        step, what, took = befall(victim, faults[kind], HELD_S)
        typer.echo(f"fault {number} at step {step}: {what}; next step after {took:.0f} s")
    (victim.directory / "hold").unlink()
    job = victim.cluster.wait_for_job(victim.job_id, 2 * PATIENCE_S)
    found = [] if job["JobState"] == "COMPLETED" else [f"the job ended as {job['JobState']}"]
    status = read_status(victim.run)
    if (status.state, status.step) != ("complete", victim.steps):
        found.append(f"the run's status: {status}")
    return found


def wild(
    cluster: VirtualSlurm, directory: Path, chance: random.Random, faults: int
) -> tuple[list[str], list[str]]:
    """The run that samples by itself; the faults, and what does not hold."""
    begun = time.monotonic()
    count = STEPS_PER_FAULT * (faults + 1)
    calm = left_alone(cluster, directory, count)
    typer.echo(f"left alone: {count} steps in {time.monotonic() - begun:.0f} s")
    victim = Victim(cluster, directory, "wild", count, chance, (f"training.steps={count}",))
    happened = kinds(FAULTS, faults, chance)
    found = course(victim, FAULTS, happened)
    rows = read_metrics(victim.run / "metrics.jsonl")
    if [row["step"] for row in rows] != list(range(1, count + 1)):
        found.append("steps are not recorded once each")
    report = compare(read_metrics(calm / "metrics.jsonl"), rows, ranks=2)
    found += [str(difference) for difference in report.differences[:10]]
    typer.echo(
        f"{report.compared} metric values of {report.steps} steps compared, {len(report.differences)} differ"
    )
    return happened, found + left_behind(victim)


def served(
    cluster: VirtualSlurm, directory: Path, chance: random.Random, faults: int
) -> tuple[list[str], list[str]]:
    """The run that samples by a server in a job of its own; the faults, and what does not hold."""
    count = STEPS_PER_FAULT * (faults + 1)
    words = (
        *("--servers-job", "1", f"training.steps={count}", "rollout.engine=sglang"),
        *(f"rollout.sglang.python={SGLANG}", "rollout.sglang.verify_every=1"),
        f"rollout.sglang.no_server_timeout_s={PATIENCE_S:g}",
    )
    victim = Victim(cluster, directory, "served", count, chance, words)
    happened = kinds(SERVER_FAULTS, faults, chance)
    found = course(victim, SERVER_FAULTS, happened)
    job = cluster.wait_for_job(victim.servers_job, PATIENCE_S)
    if job["JobState"] != "COMPLETED":
        found.append(f"the job of servers ended as {job['JobState']}")
    found += wrong_with_served(victim.run, count)
    tokens = sum(row["mismatch/tokens"] for row in read_metrics(victim.run / "metrics.jsonl"))
    typer.echo(f"with a server: {count} steps, {tokens:.0f} tokens scored by server and trainer alike")
    return happened, found + left_behind(victim)


def kinds(faults: Collection[str], number: int, chance: random.Random) -> list[str]:
    """Every kind at least once, where there are as many faults."""
    known = list(faults)
    chosen = [*chance.sample(known, len(known)), *chance.choices(known, k=number)][:number]
    chance.shuffle(chosen)
    return chosen


def main(
    faults: Annotated[
        int, typer.Option(min=0, help="In the run that samples by itself; 0: no such run")
    ] = 20,
    server_faults: Annotated[int, typer.Option(min=0, help="In the run with a server; 0: no such run")] = 6,
    seed: Annotated[
        int | None, typer.Option(help="Of faults and moments; default: another one each time")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep the runs for a look")] = False,
) -> None:
    """Let faults befall training runs on a virtual Slurm, and check what they come to."""
    if server_faults and not SGLANG.exists():
        raise UserError(f"{SGLANG}: not there; make it by `make sglang`, or give --server-faults 0")
    install()
    seed = random.randrange(1 << 30) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="slurm-chaos-"))
    typer.echo(f"seed {seed}, {faults} faults and {server_faults} with a server, in {directory}")
    begun, chance = time.monotonic(), random.Random(seed)
    try:
        write_inputs(directory)
        (directory / "cluster").mkdir()
        with VirtualSlurm(directory / "cluster") as cluster:
            happened, found = wild(cluster, directory, chance, faults) if faults else ([], [])
            if server_faults:
                more, wrong = served(cluster, directory, chance, server_faults)
                happened, found = happened + more, found + wrong
            starts = sum(len(read_starts(directory / "runs" / name)) for name in ("wild", "served"))
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    counted = ", ".join(f"{count} {kind}" for kind, count in Counter(happened).items())
    typer.echo(f"{len(happened)} faults: {counted}")
    for line in found:
        typer.echo(f"VIOLATION {line}")
    minutes = (time.monotonic() - begun) / 60
    typer.echo(f"{starts} starts of the runs in {minutes:.0f} minutes; {len(found)} violations")
    raise typer.Exit(int(bool(found)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, CannotRun) as error:
        sys.exit(f"error: {error}")
