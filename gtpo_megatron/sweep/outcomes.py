"""What a run came to, in a few numbers, from the files that it left. No torch, no model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import Metric, read_metrics
from gtpo_megatron.sweep.design import Planned

WINDOW = 5  # steps of a running mean
LN2 = math.log(2.0)
FALL = 0.05  # of the accuracy: more than two evaluations of one policy on some hundred completions differ by


@dataclass(frozen=True)
class Outcome:
    """Shares are of completions, entropies in nats, rewards in the recipe's units. `late` is the mean of the last steps."""

    accuracy_before: float  # on held-out prompts
    accuracy: float
    format: float  # share of well-formed completions of held-out prompts
    pass_at_k: float  # of as many samples as the evaluation has
    reward_late: float
    reward_start: float  # first running mean
    reward_best: float  # highest running mean
    entropy_start: float  # of the first step
    entropy_late: float
    entropy_highest: float  # of running means
    passes_ln2: float  # 1 if the highest running mean of the entropy is above ln 2
    fell: float  # 1 if the accuracy is lower than it was before training, by more than FALL
    gate_shut: float  # mean share of completions that the gate stopped; 0 of arms without one

    def as_dict(self) -> dict[str, float]:
        """Name -> number."""
        return asdict(self)


def outcome(rows: Sequence[Mapping[str, Metric]], late: int = 10) -> Outcome:
    """The outcome of a run with evaluations before and after, from the lines of its metrics.

    Args:
        rows: as `read_metrics` gives them.
        late: steps at the end whose means are the run's late figures.

    Raises:
        ValueError: a run without steps, or without two evaluations.
    """
    steps = [row for row in rows if "reward/mean" in row]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    if not steps or len(evaluations) < 2:
        raise ValueError(f"{len(steps)} steps and {len(evaluations)} evaluations; an outcome needs 1 and 2")
    reward, entropy = series(steps, "reward/mean"), series(steps, "entropy/mean")
    last, passed = evaluations[-1], next(name for name in evaluations[-1] if name.startswith("eval/pass@"))
    running = running_mean(entropy)
    before, after = (_number(row, "eval/accuracy") for row in (evaluations[0], last))
    return Outcome(
        accuracy_before=before,
        accuracy=after,
        format=_number(last, "eval/format"),
        pass_at_k=_number(last, passed),
        reward_late=fmean(reward[-late:]),
        reward_start=running_mean(reward)[0],
        reward_best=max(running_mean(reward)),
        entropy_start=entropy[0],
        entropy_late=fmean(entropy[-late:]),
        entropy_highest=max(running),
        passes_ln2=float(max(running) > LN2),
        fell=float(before - after > FALL),
        gate_shut=fmean(1.0 - _number(row, "gate/pass_rate", 1.0) for row in steps),
    )


def read_outcome(run: Planned) -> Outcome:
    """The outcome of a complete run.

    Raises:
        UserError: its files do not have what an outcome is made of.
    """
    path = run.config.path / "metrics.jsonl"
    try:
        return outcome(read_metrics(path))
    except (ValueError, StopIteration) as error:
        raise UserError(
            f"{path}: {error or 'no pass@k'} (evaluation.samples above 1, evaluation.data)"
        ) from None


def series(rows: Sequence[Mapping[str, Metric]], name: str) -> list[float]:
    """One metric over the steps; a step without a finite value (null) counts as infinitely bad, NaN."""
    return [_number(row, name, math.nan) for row in rows]


def running_mean(values: Sequence[float], width: int = WINDOW) -> list[float]:
    """Means of `width` neighbours, as many as fit; the mean of all where there are fewer."""
    width = min(width, len(values))
    return [fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def _number(row: Mapping[str, Metric], name: str, default: float | None = None) -> float:
    value = row.get(name)
    if value is None and default is None:
        raise ValueError(f"step {row['step']} has no {name}")
    return float(default if value is None else value)  # type: ignore[arg-type]
