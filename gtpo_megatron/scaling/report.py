"""A study as a table, as JSON and as a plot."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gtpo_megatron.errors import UserError
from gtpo_megatron.scaling.study import Point, Study, trained_seconds

GIB = 2**30
TABLE, PLOT = "scaling.md", "scaling.png"
# Colours of Okabe and Ito, told apart by every common colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
PARTS = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")


def write(made: Study, folder: Path) -> tuple[Path, Path]:
    """Write the table and the plot into a folder, which is made; their paths. Raises UserError if that fails."""
    table, plot = folder / TABLE, folder / PLOT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure(made).savefig(plot, dpi=110)
        temporary = folder / f".{TABLE}.tmp"
        temporary.write_text(page(made), encoding="utf-8")
        temporary.replace(table)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written there: {error.strerror or error}") from error
    return table, plot


def as_dict(made: Study) -> dict[str, Any]:
    """For JSON: seconds, tokens/s, bytes/s, GiB; null for what is not known."""
    return {
        "kind": made.kind,
        "device": made.points[0].measured.facts.device,
        "planned_for": made.gpu and made.gpu.name,
        "runs": [_point(point) for point in made.points],
    }


def _point(point: Point) -> dict[str, Any]:
    m = point.measured
    return {
        "run": str(m.run),
        "nodes": m.facts.nodes,
        "ranks": m.ranks,
        "parallel": m.facts.parallel,
        "completions": m.completions,
        "steps": m.steps,
        "dropped_steps": m.dropped,
        "seconds": m.seconds | {"step": m.step_seconds},
        "training_deviation": m.deviation,
        "tokens": m.tokens,
        "model_flop": m.flop,
        "tokens_per_second_per_rank": m.tokens_per_rank,
        "tokens_per_second_per_rank_training": m.trained_per_rank,
        "efficiency": point.efficiency,
        "efficiency_training": point.efficiency_training,
        "mfu_training": m.mfu_training,
        "sampling_tokens_per_second": m.sampling_rate,
        "weights_bytes_per_second": m.transfer_rate,
        "memory_gib": m.memory,
        "plan": point.plan and point.plan.as_dict(),
    }


def page(made: Study) -> str:
    """Markdown: what was measured, and the planner's expectation below it."""
    first = made.points[0].measured
    lines = [
        f"# {made.kind.capitalize()} scaling of {first.config.model.path.rstrip('/').rpartition('/')[2]}",
        "",
        f"Means of {_range([p.measured.steps for p in made.points])} steps a run; "
        f"{_range([p.measured.dropped for p in made.points])} before them, and traced ones, do not count. "
        f"Device: {first.facts.device}. Efficiency: tokens/s/rank over those of the smallest run.",
        "",
        *_markdown(measured_rows(made)),
        "",
    ]
    if made.gpu is None:
        lines.append(
            f"No plan beside it: plan/machines.yaml does not know {first.facts.device} (--gpu names one)."
        )
    else:
        stands = "" if first.facts.gpu else f", which these runs did not have ({first.facts.device})"
        lines += [
            f"The planner's expectation for {made.gpu.name}{stands}:",
            "",
            *_markdown(planned_rows(made)),
        ]
    return "\n".join([*lines, ""])


def measured_rows(made: Study) -> list[list[str]]:
    """The table's head and rows."""
    stages = sorted({stage for point in made.points for stage in point.measured.seconds})
    head = ["ranks", "nodes", "layout", "completions", "step s", *(f"{stage} s" for stage in stages)]
    head += ["training ±", "tokens/s/rank", "training tokens/s/rank", "efficiency", "training efficiency"]
    head += ["MFU", "sampled tokens/s", "weights GB/s", "peak GiB"]
    rows = [head]
    for point in made.points:
        m = point.measured
        row = [str(m.ranks), str(m.facts.nodes), layout(m.facts.parallel), str(m.completions)]
        row += [_number(m.step_seconds), *(_number(m.seconds.get(stage)) for stage in stages)]
        row += [_share(m.deviation), _number(m.tokens_per_rank), _number(m.trained_per_rank)]
        row += [_share(point.efficiency), _share(point.efficiency_training), _share(m.mfu_training)]
        row += [_number(m.sampling_rate), _number(m.transfer_rate and m.transfer_rate / 1e9)]
        rows.append([*row, _number(m.memory["peak"])])
    return rows


def planned_rows(made: Study) -> list[list[str]]:
    """The same of what the planner expects, each with its uncertainty in the head."""
    plans = [(point, point.plan) for point in made.points if point.plan is not None]
    unsure = plans[0][1].uncertainty
    rows = [
        ["ranks", f"step s ± {unsure['step']:.0%}", f"training s ± {unsure['training']:.0%}"]
        + ["sampling s", "transfer s", "MFU", f"peak GiB ± {unsure['memory']:.0%}"]
        + ["limited by", "training, measured / planned"]
    ]
    for point, plan in plans:
        step = plan.step
        # operations of scoring are in the stage `training` of a run
        ratio = point.measured.seconds["training"] / trained_seconds(plan, point.measured)
        row = [
            str(plan.gpus),
            _number(step.step),
            _number(trained_seconds(plan, point.measured)),
            _number(step.sampling),
        ]
        row += [_number(step.transfer), _share(step.flop_share), _number(plan.worst.total / GIB)]
        rows.append([*row, step.training.limit, f"{ratio:.3g}"])
    return rows


def layout(parallel: dict[str, Any]) -> str:
    """Sizes in the order tensor, pipeline, virtual, context, expert; those that are 1 are left out."""
    sizes = [f"{part.partition('_')[0]} {parallel[part]}" for part in PARTS if (parallel.get(part) or 1) > 1]
    return ", ".join(sizes) or "data"


def figure(made: Study) -> Figure:
    """Seconds by stage, tokens/s/rank, and efficiency, over the ranks; the plan dashed."""
    drawn = Figure(figsize=(15, 4), layout="constrained")
    stages, rates, shares = drawn.subplots(1, 3)
    names = [str(point.measured.ranks) for point in made.points]
    below = [0.0] * len(names)
    for index, stage in enumerate(sorted({s for point in made.points for s in point.measured.seconds})):
        heights = [point.measured.seconds.get(stage, 0.0) for point in made.points]
        stages.bar(names, heights, bottom=below, label=stage, color=COLOURS[index % len(COLOURS)])
        below = [low + height for low, height in zip(below, heights, strict=True)]
    stages.set(title=f"{made.kind} scaling: seconds of a step", xlabel="ranks")

    def line(axes: Any, label: str, value: Callable[[Point], float | None], style: str, colour: str) -> None:
        values = [value(point) for point in made.points]
        if None not in values:
            axes.plot(names, values, style, label=label, color=colour, marker="o", markersize=4)

    line(rates, "step", lambda p: p.measured.tokens_per_rank, "-", COLOURS[0])
    line(rates, "training", lambda p: p.measured.trained_per_rank, "-", COLOURS[1])
    line(rates, "training, plan", _planned_rate, "--", COLOURS[1])
    rates.set(title="tokens/s/rank", xlabel="ranks", yscale="log")
    line(shares, "step", lambda p: p.efficiency, "-", COLOURS[0])
    line(shares, "training", lambda p: p.efficiency_training, "-", COLOURS[1])
    first = _planned_rate(made.points[0])
    line(shares, "training, plan", lambda p: first and (_planned_rate(p) or 0) / first, "--", COLOURS[1])
    shares.axhline(1.0, color="gray", linewidth=1)
    shares.set(title="efficiency: tokens/s/rank over the smallest run's", xlabel="ranks", ylim=(0, None))
    for axes in (stages, rates, shares):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return drawn


def _planned_rate(point: Point) -> float | None:
    if point.plan is None:
        return None
    return point.plan.step.tokens / trained_seconds(point.plan, point.measured) / point.plan.gpus


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def to_json(made: Study) -> str:
    """One line."""
    return json.dumps(as_dict(made))
