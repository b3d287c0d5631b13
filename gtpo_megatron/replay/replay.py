"""A recorded step held against its recomputation in float64."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.replay.float64 import Policy, Step, recompute
from gtpo_megatron.replay.weights import weights_after
from gtpo_megatron.run.metrics import Metric, read_metrics
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.seen import Seen, read_seen
from gtpo_megatron.trajectories.store import TrajectoryStore

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # by the type that the run computes in


@dataclass(frozen=True)
class Check:
    """A figure of the run against the recomputed one."""

    name: str
    recorded: float | None
    recomputed: float
    difference: float | None  # relative to `scale`; None where the run recorded nothing
    scale: float
    at: str = ""  # of several completions: the one that differs most


@dataclass(frozen=True)
class Replay:
    """What a replay found."""

    step: int
    checks: tuple[Check, ...]
    completions: tuple[dict[str, Any], ...]  # a row each, as --json prints them
    missing: tuple[str, ...]  # what the run did not record, in sentences
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether every figure that was recorded is within the tolerance."""
        return all(check.difference is None or check.difference <= self.tolerance for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"agrees": self.agrees}


def replay(
    run_dir: Path, step: int, tolerance: float | None = None, say: Callable[[str], None] = lambda _: None
) -> Replay:
    """Recompute a step of a run from its stored batch and the weights before it.

    Args:
        run_dir: the run's directory; it is only read.
        step: as in the metrics, from 1.
        tolerance: largest relative difference; default by the run's type.
        say: told what is done.

    Raises:
        UserError: no such run or step, a batch that is not stored, supervised training, several updates a batch, or adapters.
    """
    config = load_config(run_dir / "config.yaml")
    if config.algorithm.name == "sft":
        raise UserError(f"{run_dir}: supervised training stores no batches, so there is nothing to replay")
    if config.algorithm.updates_per_batch != 1:
        raise UserError(
            f"{run_dir}: algorithm.updates_per_batch: a step of several updates cannot be replayed"
        )
    if config.model.lora is not None:
        raise UserError(
            f"{run_dir}: model.lora: training of adapters cannot be replayed, only that of all weights"
        )
    row = _row(run_dir, step)
    batch = TrajectoryStore(run_dir / "trajectories").read(step - 1)
    seen = read_seen(run_dir / "trajectories", step - 1)
    if seen is not None and len(seen) != len(batch):
        raise UserError(
            f"{run_dir}: what training saw of step {step} is of another batch than the stored one"
        )
    with tempfile.TemporaryDirectory(prefix="gtpo-replay-") as scratch:
        directory = weights_after(run_dir, config, step - 1, Path(scratch), say)
        policy = Policy(directory, config.model.dtype)
        say(f"recomputing {len(batch)} completions in float64")
        found = recompute(
            policy,
            batch,
            config.algorithm.model_dump(),
            config.rollout.temperature,
            row.get("entropy/initial") if step > 1 else None,
            Policy(config.model.path, config.model.dtype) if config.algorithm.kl_beta else None,
        )
    limit = TOLERANCE[config.model.dtype] if tolerance is None else tolerance
    return Replay(
        step,
        tuple(_checks(row, batch, seen, found, config)),
        tuple(_rows(batch, seen, found)),
        _missing(seen),
        limit,
    )


def _row(run_dir: Path, step: int) -> dict[str, Metric]:
    rows = {row["step"]: row for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row}
    if step not in rows:
        stored = f"{min(rows)} to {max(rows)}" if rows else "none"
        raise UserError(f"--step {step}: the metrics of {run_dir} have no such step (steps: {stored})")
    return rows[step]


def _checks(
    row: dict[str, Metric], batch: Sequence[Trajectory], seen: Seen | None, found: Step, config: RunConfig
) -> list[Check]:
    completions = found.completions
    shares = math.fsum(abs(c.share) for c in completions) or 1.0  # they cancel in the loss
    checks = [
        _one("loss", row.get("loss"), found.loss, shares),
        _one("grad_norm", row.get("grad_norm"), found.grad_norm, found.grad_norm or 1.0),
        _most(
            "advantage",
            [t.advantage for t in batch],
            [c.part.advantage for c in completions],
            max(abs(c.part.advantage) for c in completions) or 1.0,
        ),
    ]
    for name in ("prefix", "suffix") if config.algorithm.name == "gtpo" else ():
        recorded = [getattr(t, name) for t in batch]
        checks.append(_most(name, recorded, [getattr(c.part, name) for c in completions], 1.0))
    if seen is None:
        return checks
    largest = max(abs(c.coefficient) for c in completions) or 1.0
    checks.append(_most("coefficient", seen.coefficient, [c.coefficient for c in completions], largest))
    checks.append(_most("entropy", seen.entropy, [c.entropy for c in completions], 1.0))
    if seen.gate is not None:
        checks.append(_most("gate", seen.gate, [c.gate for c in completions], 1.0))
    if seen.logprobs is not None:
        places = [
            int(np.argmax(np.abs(a - c.logprobs.numpy())))
            for a, c in zip(seen.logprobs, completions, strict=True)
        ]
        checks.append(
            _most(
                "logprob",
                [float(a[k]) for a, k in zip(seen.logprobs, places, strict=True)],
                [float(c.logprobs[k]) for c, k in zip(completions, places, strict=True)],
                1.0,
            )
        )
    return checks


def _one(name: str, recorded: Metric, recomputed: float, scale: float) -> Check:
    if recorded is None:
        return Check(name, None, recomputed, None, scale)
    return Check(name, float(recorded), recomputed, abs(float(recorded) - recomputed) / scale, scale)


def _most(name: str, recorded: Sequence[float], recomputed: Sequence[float], scale: float) -> Check:
    """The check of the completion that differs most; a NaN of the run differs by infinity."""
    a, b = np.asarray(recorded, np.float64), np.asarray(recomputed, np.float64)
    differences = np.nan_to_num(np.abs(a - b), nan=math.inf) / scale
    place = int(differences.argmax())
    at = f"completion {place}"
    return Check(name, float(a[place]), float(b[place]), float(differences[place]), scale, at)


def _rows(batch: Sequence[Trajectory], seen: Seen | None, found: Step) -> list[dict[str, Any]]:
    rows = []
    for place, (trajectory, c) in enumerate(zip(batch, found.completions, strict=True)):
        row: dict[str, Any] = {"group": trajectory.group, "index": trajectory.index, "share": c.share}
        row |= {"advantage": c.part.advantage, "prefix": c.part.prefix, "suffix": c.part.suffix}
        row |= {"entropy": c.entropy, "gate": c.gate, "coefficient": c.coefficient}
        if seen is not None:
            row |= {
                "recorded_entropy": float(seen.entropy[place]),
                "recorded_coefficient": float(seen.coefficient[place]),
            }
        rows.append(row)
    return rows


def _missing(seen: Seen | None) -> tuple[str, ...]:
    if seen is None:
        return ("what training saw of the completions was not recorded (logging.seen: off)",)
    if seen.logprobs is None:
        return ("the trainer's log-probabilities were not recorded (logging.seen: completions)",)
    return ()
