#!/usr/bin/env python
"""Kill a training run with SIGKILL at random moments, and compare all its metrics with those of a run left alone.

    tools/chaos.py                       20 kills on a tiny model made on the spot
    tools/chaos.py --kills 3 --seed 7    the short form that the tests use
    tools/chaos.py --recipe RECIPE.yaml  a recipe of your own, with its number of steps

The moments: after a random share of a step, inside the writing of a checkpoint, and while the trainer starts or resumes.
Ends with 1 if any metric differs. Every kill is listed.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.run.verify_resume import ResumeReport, Training, compare, last_step, short_copy

REPOSITORY = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, REPOSITORY)  # for the tests' tiny model, here and in the trainers
os.environ["PYTHONPATH"] = REPOSITORY

PARTIAL = ".step-*.partial-*"
MOMENTS = ("in a step", "in a save", "at the start")


@dataclass(frozen=True)
class Kill:
    """One kill: which moment was aimed at, and where the run stood."""

    moment: str
    delay_s: float
    step: int
    partial_checkpoints: int  # half-written ones that it left behind


def chaos(
    config: RunConfig, directory: Path, kills: int, seed: int, ranks: int = 1
) -> tuple[ResumeReport, list[Kill]]:
    """Train a copy of `config` undisturbed, and another with `kills` SIGKILLs; compare their metrics.

    Raises UserError if a run fails by itself.
    """
    chance = random.Random(seed)
    steps = config.training.steps
    calm, wild = (short_copy(config, directory, name, steps, every=1) for name in ("calm", "wild"))
    began = time.time()
    Training(calm, ranks).finish()
    times = [float(line["time"]) for line in read_metrics(directory / "calm" / "metrics.jsonl")]
    start_s, step_s = times[0] - began, (times[-1] - times[0]) / (steps - 1)
    typer.echo(f"uninterrupted: first step after {start_s:.1f} s, then {step_s:.2f} s a step")
    done = []
    for number, moment in enumerate(_moments(kills, chance)):
        # targets spread over the run, so that it cannot end before the last kill
        target = max(1, number * steps // kills)
        delay = chance.uniform(0.0, {"in a step": step_s, "in a save": 0.05, "at the start": start_s}[moment])
        done.append(_kill(wild, directory / "wild", moment, target, delay, ranks))
        kill = done[-1]
        typer.echo(
            f"kill {number + 1}: {kill.moment}, {kill.delay_s * 1000:.0f} ms later; {kill.step} steps recorded, "
            f"{kill.partial_checkpoints} half-written checkpoint(s) left"
        )
    Training(wild, ranks).finish()
    metrics = [read_metrics(directory / name / "metrics.jsonl") for name in ("calm", "wild")]
    return compare(*metrics, killed_after=done[-1].step, ranks=ranks), done


def _moments(kills: int, chance: random.Random) -> Iterator[str]:
    """Every kind at least once, where there are as many kills."""
    chosen = [*MOMENTS, *chance.choices(MOMENTS[:2], k=max(kills - len(MOMENTS), 0))][:kills]
    chance.shuffle(chosen)
    yield from chosen


def _kill(recipe: Path, run: Path, moment: str, target: int, delay: float, ranks: int) -> Kill:
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    recorded, leftovers = last_step(metrics), set(checkpoints.glob(PARTIAL))

    def reached() -> bool:
        return last_step(metrics) >= max(target, recorded + 1)

    def saving() -> bool:
        return reached() and bool(set(checkpoints.glob(PARTIAL)) - leftovers)

    training = Training(recipe, ranks)
    condition = {"in a step": reached, "in a save": saving, "at the start": lambda: True}[moment]
    if not training.kill_when(condition, delay):
        raise UserError(f"the run ended before it could be killed {moment}; give it more training.steps")
    return Kill(moment, delay, last_step(metrics), len(list(checkpoints.glob(PARTIAL))))


def tiny_run(directory: Path, steps: int) -> RunConfig:
    """GTPO on sums with a tiny model and tokenizer, all made in `directory`."""
    from tests.tiny_models import make_tiny_checkpoint

    model = make_tiny_checkpoint(directory / "model", "qwen2_tied")
    data = directory / "sums.jsonl"
    data.write_text(
        "".join(f'{{"question": "{a} + {b} =", "answer": "{a + b}"}}\n' for a in range(5) for b in range(5))
    )
    return RunConfig.model_validate(
        {
            "name": "chaos",
            "dir": str(directory),
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"path": str(data), "system_prompt": "", "max_prompt_tokens": 64},
            "training": {"steps": steps, "micro_batch_tokens": 256},
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
            "rewards": {"terms": [{"kind": "python", "function": "tests.chaos_reward:different_characters"}]},
            "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
        }
    )


def main(
    recipe: Annotated[Path | None, typer.Option(help="Recipe to train; default: a tiny one")] = None,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Steps of the tiny recipe; default: kills + 4")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the moments; default: another one each time")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes (torchrun)")] = 1,
    keep: Annotated[bool, typer.Option(help="Keep the runs for a look")] = False,
) -> None:
    """Kill a training run again and again, and compare its metrics with an undisturbed one's."""
    seed = random.randrange(1 << 30) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    typer.echo(f"seed {seed}, {kills} kills, {ranks} rank(s), in {directory}")
    try:
        config = load_config(recipe) if recipe else tiny_run(directory, steps or kills + 4)
        report, done = chaos(config, directory, kills, seed, ranks)
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    count = {moment: sum(k.moment == moment for k in done) for moment in MOMENTS}
    typer.echo(f"{len(done)} kills: {', '.join(f'{n} {moment}' for moment, n in count.items())}")
    for difference in report.differences[:10]:
        typer.echo(f"DIFFERS {difference}")
    typer.echo(
        f"{report.compared} metric values of {report.steps} steps compared, {len(report.differences)} differ"
    )
    raise typer.Exit(0 if report.exact else 1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
