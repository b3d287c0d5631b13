"""One recipe on more and more GPUs, by the planner: the fastest layout of each number, what limits it, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.estimate import Plan
from gtpo_megatron.plan.facts import GPU, Efficiency
from gtpo_megatron.plan.layout import HFShape
from gtpo_megatron.plan.memory import GIB
from gtpo_megatron.plan.search import search
from gtpo_megatron.plan.time import UNCERTAINTY


@dataclass(frozen=True)
class Point:
    """The fastest plan that fits on a number of the trainer's GPUs, or why there is none."""

    gpus: int
    plan: Plan | None
    reason: str = ""


def grow(
    counts: Sequence[int],
    config: RunConfig,
    shape: HFShape,
    gpu: GPU,
    lengths: Sequence[float],
    reached: Efficiency,
) -> list[Point]:
    """A point for each number of GPUs; the batch stays as it is."""
    return [_point(gpus, config, shape, gpu, lengths, reached) for gpus in counts]


def _point(
    gpus: int,
    config: RunConfig,
    shape: HFShape,
    gpu: GPU,
    lengths: Sequence[float],
    reached: Efficiency,
) -> Point:
    try:
        found = search(config, shape, gpus, gpu, lengths, reached)
    except UserError as error:  # no server stands on so few GPUs
        return Point(gpus, None, str(error))
    if not found:
        return Point(gpus, None, "no layout stands on so many")
    best = found[0].plan
    return (
        Point(gpus, best)
        if best.fits
        else Point(gpus, None, f"the smallest takes {best.worst.total / GIB:.0f} GiB a GPU")
    )


def doubled(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to last."""
    counts = [first]
    while 2 * counts[-1] <= last:
        counts.append(2 * counts[-1])
    return counts


def layout_words(plan: Plan) -> str:
    """Tensor, pipeline, virtual, context, expert, recomputation."""
    p = plan.parallel
    sizes = (p.tensor, p.pipeline, p.virtual_pipeline or 1, p.context, p.expert)
    return f"{', '.join(map(str, sizes))}, {plan.recompute}"


def training_rate(plan: Plan) -> float:
    """Tokens/s/GPU while training."""
    return plan.step.tokens / plan.step.training.total / plan.gpus


def plot(series: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Seconds of sampling and training, and what is kept of the best tokens/s/GPU, over GPUs; a colour for each name.

    Points without a plan are left out. The file's ending decides its format.
    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    seconds, kept = figure.subplots(1, 2)
    for number, (name, points) in enumerate(series.items()):
        _draw(
            seconds, kept, name, [point.plan for point in points if point.plan is not None], f"C{number % 10}"
        )
    seconds.set_yscale("log")
    seconds.set_ylabel("seconds: sampling (solid), training (dashed)")
    kept.set_ylim(0, 1.05)
    kept.set_ylabel("training's tokens/s/GPU over its best")
    ticks = sorted({point.gpus for points in series.values() for point in points})
    for axes in (seconds, kept):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(gpus) for gpus in ticks])
        axes.set_xlabel("trainer's GPUs")
        axes.grid(alpha=0.3)
    unsure = UNCERTAINTY
    figure.suptitle(
        f"planned, not measured: training ± {unsure['dense']:.0%}, of mixtures of experts ± {unsure['mixture']:.0%}",
        fontsize="medium",
    )
    figure.legend(*kept.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path}: cannot be written: {error}") from error


def _draw(seconds: Any, kept: Any, name: str, plans: Sequence[Plan], color: str) -> None:
    gpus, style = [plan.gpus for plan in plans], {"color": color, "marker": "o"}
    sampled = [plan for plan in plans if plan.step.sampling is not None]
    best = max((training_rate(plan) for plan in plans), default=1.0)
    seconds.plot([plan.gpus for plan in sampled], [plan.step.sampling for plan in sampled], **style)
    seconds.plot(gpus, [plan.step.training.total for plan in plans], linestyle="--", **style)
    kept.plot(gpus, [training_rate(plan) / best for plan in plans], label=name, **style)
