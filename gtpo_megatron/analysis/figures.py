"""The plot of a run: one panel for each kind of metric that it has.

Every rank reads this module with the training loop; matplotlib, half a second, is imported where something is drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtpo_megatron.run.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Metric]]
_REWARD_OTHERS = ("reward/std", "reward/failed")


@dataclass(frozen=True)
class _Panel:
    title: str
    wants: Callable[[str], bool]  # metric names drawn as lines
    unit: str = ""
    log: bool = False
    decorate: Callable[["Axes", Rows], None] | None = None


def plot_run(rows: Rows, path: Path, title: str) -> None:
    """Draw the metrics over steps into a PNG file; panels without data are left out."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = [
        (panel, lines)
        for panel in _PANELS
        if (lines := [n for n in names if panel.wants(n) and series(rows, n)[0]])
    ]
    columns = min(3, max(1, len(panels)))
    height = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5 * columns, 3.2 * height), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(height, columns, squeeze=False).flat
    for axes, (panel, lines) in zip(grid, panels, strict=False):
        for name in sorted(lines, key=lambda name: not name.endswith("/mean")):
            steps, values = series(rows, name)
            marker = "o" if len(steps) < 30 else None
            axes.plot(
                steps,
                values,
                label=suite_of(name) or name.partition("/")[2] or name,
                marker=marker,
                markersize=3,
            )
        if panel.decorate:
            panel.decorate(axes, rows)
        if panel.log and min(min(series(rows, name)[1]) for name in lines) > 0:
            axes.set_yscale("log")
        axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


# Colours of Okabe and Ito, told apart by every common colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")


def plot_recipes(recipes: Sequence[Any], names: Sequence[str], path: Path) -> None:
    """Draw a panel a metric with a line a recipe: the mean of its runs, and a band from the lowest to the highest.

    Args:
        recipes: of `recipes.Recipe`: `label`, and `band(metric)` giving (steps, values [runs, steps]).
        names: metrics.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(names)))
    height = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(5 * columns, 3.2 * height + 0.4), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flat
    for axes, name in zip(grid, names, strict=False):
        for place, recipe in enumerate(recipes):
            steps, values = recipe.band(name)
            if not steps:
                continue
            colour = _COLOURS[place % len(_COLOURS)]
            style = _STYLES[place // len(_COLOURS) % len(_STYLES)]
            marker = "o" if len(steps) < 30 else None
            axes.plot(
                steps, values.mean(0), style, color=colour, label=recipe.label, marker=marker, markersize=3
            )
            if len(values) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        if name == "entropy/mean":
            axes.axhline(math.log(2), color="gray", linestyle="--", linewidth=1)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(names) :]:
        axes.set_visible(False)
    handles = {}
    for axes in figure.axes:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, max(1, len(recipes)))
    )
    figure.savefig(path, dpi=110)


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it has a value."""
    pairs = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _entropy(axes: "Axes", rows: Rows) -> None:
    low_steps, low = series(rows, "entropy/p10")
    high_steps, high = series(rows, "entropy/p90")
    if low and low_steps == high_steps:
        axes.fill_between(low_steps, low, high, alpha=0.2, label="p10 to p90")
    axes.axhline(math.log(2), color="gray", linestyle="--", linewidth=1, label="ln 2")


_EVALUATION_SIZES = ("eval/prompts", "eval/length_mean")


def suite_of(name: str) -> str | None:
    """The suite whose metric this is, of names like eval/<suite>/<figure>; None of all other metrics."""
    section, _, rest = name.partition("/")
    suite, slash, _ = rest.partition("/")
    return suite if section == "eval" and slash else None


_PANELS = (
    _Panel("Reward", lambda name: name.startswith("reward/") and name not in _REWARD_OTHERS),
    _Panel(
        "Evaluation",
        lambda name: name.startswith("eval/") and name not in _EVALUATION_SIZES and suite_of(name) is None,
    ),
    _Panel("Suites", lambda name: suite_of(name) is not None and name.endswith("/accuracy"), "share"),
    _Panel("Loss", lambda name: name == "loss"),
    _Panel("Entropy", lambda name: name in ("entropy/mean", "entropy/p50"), "nats", decorate=_entropy),
    _Panel("Conflict tokens", lambda name: name.startswith("conflict/") and name.endswith("_share"), "share"),
    _Panel("Response length", lambda name: name.startswith("response/length_"), "tokens"),
    _Panel("Gradient norm", lambda name: name == "grad_norm"),
    _Panel("|trainer - sampler| logprob", lambda name: name.startswith("logprob_gap/"), "nats", log=True),
)
