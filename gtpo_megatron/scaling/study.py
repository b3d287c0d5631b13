"""A scaling study: the runs that make it, and what runs that were made say together.

Strong: the batch stays as it is. Weak: it grows with the nodes. A run has its own directory; everything else of the recipe is
the same, but the layout, where one does not fit all sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.estimate import Plan, completion_lengths, make_plan
from gtpo_megatron.plan.facts import GPU, Efficiency, efficiency
from gtpo_megatron.scaling.measured import Measured, measure

Kind = Literal["strong", "weak"]
# What runs of one study may differ in: names, what is kept of them, how the model is spread, where servers are
FREE = {
    "name": None,
    "dir": None,
    "parallel": None,
    "logging": None,
    "checkpoint": None,
    "evaluation": None,
    "alarm": None,
    "training": ("steps", "profile", "sft_batch_size"),
    "rollout": ("prompts_per_step",),
    "rollout.sglang": ("urls", "urls_file", "urls_dir", "servers", "first_gpu", "api_key", "host"),
}


@dataclass(frozen=True)
class Point:
    """A run of a study beside what the planner expects of it."""

    measured: Measured
    plan: Plan | None  # None where the GPU is not known
    efficiency: float  # tokens/s/rank over those of the smallest run
    efficiency_training: float  # the same while training


@dataclass(frozen=True)
class Study:
    """Runs of one recipe, the smallest first."""

    kind: Kind
    points: tuple[Point, ...]
    gpu: GPU | None  # that the planner took


def settings(config: RunConfig, nodes: int, smallest: int, kind: Kind) -> list[str]:
    """What makes the recipe the run of a study on so many nodes, as key=value."""
    found = [f"name={config.name}-{kind}-{nodes}"]
    if kind == "weak":
        sft = config.algorithm.name == "sft"
        key = "training.sft_batch_size" if sft else "rollout.prompts_per_step"
        batch = config.training.sft_batch_size if sft else config.rollout.prompts_per_step
        found.append(f"{key}={grown(batch, nodes, smallest)}")
    return found


def grown(count: int, nodes: int, smallest: int) -> int:
    """What `count` on the fewest nodes comes to on more of them. Raises UserError if that is no whole number."""
    if count * nodes % smallest:
        raise UserError(
            f"--scaling: {count} for {smallest} nodes is no whole number for {nodes}; take multiples of {smallest}"
        )
    return count * nodes // smallest


def node_counts(text: str) -> list[int]:
    """Numbers of nodes, e.g. 1,2,4. Raises UserError if they are none, or one is given twice."""
    words = text.split(",")
    counts = [int(word) for word in words if word.strip().isdecimal()]
    if len(counts) < len(words) or min(counts) < 1 or len(set(counts)) < len(counts) or len(counts) < 2:
        raise UserError(f"--scaling {text}: expected two or more different numbers of nodes, e.g. 1,2,4")
    return sorted(counts)


def study(runs: Sequence[Path], warmup: int, gpu: GPU | None = None) -> Study:
    """Read the runs of a study.

    Args:
        gpu: what the planner takes where the runs' own GPU is not known.

    Raises:
        UserError: a directory is no run's or has no step behind the warm-up, the recipes differ, two runs have as many
            ranks, or the batch neither stays nor grows with them.
    """
    found = sorted((measure(run, warmup) for run in runs), key=lambda measured: measured.ranks)
    first = found[0]
    for measured in found[1:]:
        _check_same(first, measured)
    by_ranks = {measured.ranks: measured for measured in found}
    for measured in found:
        if (other := by_ranks[measured.ranks]) is not measured:
            raise UserError(
                f"{measured.run} and {other.run}: both of {measured.ranks} ranks; give one of the two"
            )
    kind, gpu = _kind(found), first.facts.gpu or gpu
    points = [
        Point(
            measured,
            gpu and expected(measured, gpu, efficiency()),
            measured.tokens_per_rank / first.tokens_per_rank,
            measured.trained_per_rank / first.trained_per_rank,
        )
        for measured in found
    ]
    return Study(kind, tuple(points), gpu)


def _check_same(first: Measured, other: Measured) -> None:
    before, after = _fixed(first.config), _fixed(other.config)
    if first.facts.device != other.facts.device:
        raise UserError(
            f"{first.run} and {other.run}: on different devices ({first.facts.device}, {other.facts.device})"
        )
    if different := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        shown = "; ".join(f"{key}: {before.get(key)} and {after.get(key)}" for key in different[:5])
        raise UserError(
            f"{first.run} and {other.run}: runs of different recipes ({shown}); give those of one"
        )


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The recipe's keys that all runs of a study share, dotted."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if (dotted in FREE and FREE[dotted] is None) or key in (FREE.get(prefix.rstrip(".")) or ()):
                continue
            flat |= walk(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
        return flat

    return walk(config.model_dump(mode="json"), "")


def _kind(found: Sequence[Measured]) -> Kind:
    """Strong of a batch that stays, weak of one that grows as the ranks."""
    first = found[0]
    if len({measured.completions for measured in found}) == 1:
        return "strong"
    for measured in found:
        if measured.completions * first.ranks != first.completions * measured.ranks:
            raise UserError(
                f"{first.run} has {first.completions} completions a step on {first.ranks} ranks, {measured.run} has "
                f"{measured.completions} on {measured.ranks}: neither the same (strong scaling) nor as many a rank (weak)"
            )
    return "weak"


def expected(measured: Measured, gpu: GPU, reached: Efficiency) -> Plan:
    """What the planner expects of a run, for completions as long as it had."""
    source = None if measured.generated is None else measured.run
    lengths = completion_lengths(measured.config, source)
    return make_plan(measured.config, measured.facts.shape, measured.ranks, gpu, lengths, reached)


def trained_seconds(plan: Plan, measured: Measured) -> float:
    """Planned seconds of what a run calls training: all updates, and scoring before them."""
    return plan.step.training.total * measured.config.algorithm.updates_per_batch + plan.step.scoring
