"""Showing that a resume changes nothing: a short copy of a run, killed and started again, against one left alone."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config, save_config
from gtpo_megatron.errors import COMPLETE, STOPPED, UserError
from gtpo_megatron.processes import kill_group
from gtpo_megatron.run.metrics import is_measured, read_metrics

POLL_S = 0.01


@dataclass(frozen=True)
class Difference:
    """A metric of a step that the two runs do not share."""

    step: int
    metric: str
    uninterrupted: Any
    interrupted: Any

    @property
    def relative(self) -> float:
        """Relative difference; infinite where it is not one of numbers."""
        numbers = isinstance(self.uninterrupted, int | float) and isinstance(self.interrupted, int | float)
        if not numbers:
            return math.inf
        scale = max(abs(self.uninterrupted), abs(self.interrupted))
        return abs(self.uninterrupted - self.interrupted) / scale if scale else 0.0


@dataclass(frozen=True)
class ResumeReport:
    """What was tried, and how the metrics compare."""

    start: int  # step of the checkpoint that both runs began at; 0: the beginning
    steps: int  # trained by each
    killed_after: int  # steps that the interrupted run had recorded when it was killed
    ranks: int
    compared: int  # values
    differences: list[Difference]

    @property
    def exact(self) -> bool:
        """Whether all metrics are equal, bit for bit."""
        return not self.differences

    def summary(self) -> str:
        """One paragraph for a person."""
        tried = (
            f"from step {self.start}, {self.steps} steps on {self.ranks} rank(s); one run was left alone, the other was "
            f"killed (SIGKILL) after {self.killed_after} of them and started again: {self.compared} values compared, "
        )
        if self.exact:
            return tried + "all equal"
        worst = max(self.differences, key=lambda d: d.relative)
        return tried + (
            f"{len(self.differences)} differ; the most at step {worst.step}, {worst.metric}: "
            f"{worst.uninterrupted} and {worst.interrupted}"
        )


def verify_resume(run_dir: Path, steps: int = 3) -> ResumeReport:
    """Train `steps` (at least 2) steps from a run's newest checkpoint twice, once with a kill -9, and compare.

    The run itself is only read. Raises UserError if it is no run, or if one of the two copies fails to train.
    """
    config = load_config(Path(run_dir) / "config.yaml")
    checkpoints = sorted((Path(run_dir) / "checkpoints").glob("step-*/manifest.json"))
    start = int(checkpoints[-1].parent.name.removeprefix("step-")) if checkpoints else 0
    ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        recipes = []
        for name in ("uninterrupted", "interrupted"):
            recipes.append(short_copy(config, Path(scratch), name, start + steps))
            if checkpoints:
                _copy_checkpoint(checkpoints[-1].parent, Path(scratch) / name / "checkpoints")
        paths = [Path(scratch) / name / "metrics.jsonl" for name in ("uninterrupted", "interrupted")]
        Training(recipes[0], ranks).finish()
        training = Training(recipes[1], ranks)
        training.kill_when(lambda: last_step(paths[1]) > start)
        killed_after = last_step(paths[1]) - start
        Training(recipes[1], ranks).finish()
        return compare(*map(read_metrics, paths), start=start, killed_after=killed_after, ranks=ranks)


def short_copy(config: RunConfig, directory: Path, name: str, steps: int, **checkpoint: Any) -> Path:
    """Write the recipe of a short, quiet copy of a run in `directory`, which saves at every step."""
    values = config.model_dump(mode="json")
    values |= {"name": name, "dir": str(directory)}
    values["training"] |= {"steps": steps, "profile": {}}
    values["checkpoint"] |= {"every": 1, "export_hf": False} | checkpoint
    values["logging"] = {"tensorboard": False, "wandb": False, "progress": "plain"}
    values["evaluation"] = {}
    recipe = directory / f"{name}.yaml"
    save_config(RunConfig.model_validate(values), recipe)
    return recipe


def _copy_checkpoint(checkpoint: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    shutil.copytree(checkpoint, directory / checkpoint.name)


class Training:
    """A training process (with torchrun: a family of them) that can be killed at a moment of one's choice."""

    def __init__(self, recipe: Path, ranks: int = 1) -> None:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        )
        self._log = recipe.with_suffix(".log")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "gtpo_megatron", "train", str(recipe)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # neither torchrun's world, nor that of a Slurm step
                env={
                    key: value
                    for key, value in os.environ.items()
                    if key not in ("RANK", "WORLD_SIZE") and not key.startswith("SLURM_STEP")
                },
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that was started (with torchrun: the launcher)."""
        return self._process.pid

    def stop(self) -> None:
        """Ask it to end after its step, and wait until it has. Raises UserError with the end of its log if it failed."""
        self._process.terminate()
        self._wait(STOPPED)

    def finish(self) -> None:
        """Wait for its end. Raises UserError with the end of its log if it failed."""
        self._wait(COMPLETE)

    def _wait(self, expected: int) -> None:
        try:
            if self._process.wait() != expected:
                raise UserError(f"training failed:\n{self._tail()}")
        finally:
            self.kill()

    def kill_when(self, moment: Callable[[], bool], delay_s: float = 0.0) -> bool:
        """SIGKILL all its processes `delay_s` after `moment` is true; False if it ended by itself before.

        Raises UserError if it failed by itself.
        """
        try:
            while self.running and not moment():
                time.sleep(POLL_S)
            time.sleep(delay_s)
            alive = self.running
            if not alive and self._process.returncode:
                raise UserError(f"training failed:\n{self._tail()}")
            return alive
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL its whole process group, and wait until it is gone."""
        kill_group(self._process.pid)
        self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])


def last_step(path: Path) -> int:
    """The last step that a metrics file records; 0 if there is none."""
    return max((int(line["step"]) for line in read_metrics(path)), default=0) if path.exists() else 0


def compare(
    uninterrupted: list[Mapping[str, Any]],
    interrupted: list[Mapping[str, Any]],
    *,
    start: int = 0,
    killed_after: int = 0,
    ranks: int = 1,
) -> ResumeReport:
    """Compare two runs' metrics after step `start`, line by line, all but times and memory."""
    lines = [[line for line in run if line["step"] > start] for run in (uninterrupted, interrupted)]
    differences, compared = [], 0
    if len(lines[0]) != len(lines[1]):
        differences.append(Difference(start, "number of lines", len(lines[0]), len(lines[1])))
    for a, b in zip(*lines, strict=False):
        for key in sorted(a.keys() | b.keys()):
            if is_measured(key):
                continue
            compared += 1
            if a.get(key, "absent") != b.get(key, "absent"):
                differences.append(Difference(int(a["step"]), key, a.get(key), b.get(key)))
    steps = len({line["step"] for line in lines[0]})
    return ResumeReport(start, steps, killed_after, ranks, compared, differences)
