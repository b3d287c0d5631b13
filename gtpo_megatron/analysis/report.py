"""A run on one page: a Markdown summary, a plot, and a table in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gtpo_megatron.analysis.figures import plot_run, suite_of
from gtpo_megatron.analysis.goodput import Goodput, goodput_notes, goodput_rows, read_goodput
from gtpo_megatron.config.loading import read_recorded
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import Metric, read_metrics
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

_ESSENTIALS = (
    "model.path",
    "model.dtype",
    "algorithm.name",
    "algorithm.compat",
    "data.path",
    "rollout.engine",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "training.steps",
    "training.sft_batch_size",
    "training.seed",
    "optimizer.lr",
    "parallel.tensor",
    "parallel.pipeline",
)
_NOT_FOR = {
    "sft": ("rollout.", "algorithm.compat"),
    "gtpo": ("training.sft_",),
    "grpo": ("training.sft_", "algorithm.compat"),
}
NEEDED = ("name", "algorithm.name", "training.steps")  # of a run's configuration
_EXAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run."""

    name: str
    first: float
    last: float


def write_report(run_dir: Path | str, console: Console | None = None) -> Path:
    """Write `summary.md` and `report.png` into the run's directory, print the main table, and return the summary's path.

    Raises:
        UserError: the directory is no run's, holds no step yet, cannot be written to, or one of its files is damaged.
    """
    run_dir = Path(run_dir)
    config = read_recorded(run_dir / "config.yaml", NEEDED)
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{run_dir / 'metrics.jsonl'}: no step is finished yet, so there is nothing to report"
        )
    window = max(1, min(5, len(_training_rows(rows)) // 4))
    changes = _changes(rows, window)
    goodput = read_goodput(run_dir, rows)

    summary = run_dir / "summary.md"
    try:
        plot_run(
            rows, run_dir / "report.png", title=config["name"]
        )  # first: the summary lists the files that there are
        summary.write_text(_summary(run_dir, config, rows, changes, window, goodput), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{run_dir}: the report cannot be written there: {error.strerror or error}; copy the run, or make room"
        ) from error
    _print(console or Console(), run_dir, rows, changes, window, goodput)
    return summary


def _training_rows(rows: list[dict[str, Metric]]) -> list[dict[str, Metric]]:
    """Steps of training; a line of step 0 holds what was measured before it."""
    return [row for row in rows if row["step"]]


def _changes(rows: list[dict[str, Metric]], window: int) -> list[Change]:
    """First and last value of every metric: means over `window` steps, of an evaluation its own value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    changes = []
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if name in ("step", "time") or name.startswith("seconds/") or not values:
            continue
        n = 1 if name.startswith("eval/") else window
        changes.append(Change(name, float(np.mean(values[:n])), float(np.mean(values[-n:]))))
    return changes


def _stages(rows: list[dict[str, Metric]]) -> dict[str, float]:
    """Mean seconds per step of each stage, over the steps of training."""
    rows = _training_rows(rows)
    steps = len({row["step"] for row in rows})  # an evaluation may be a line of its own
    names = sorted({name for row in rows for name in row if name.startswith("seconds/")})
    return {
        name.removeprefix("seconds/"): sum(row.get(name) or 0.0 for row in rows) / steps for name in names
    }


def _summary(
    run_dir: Path,
    config: dict[str, Any],
    rows: list[dict[str, Metric]],
    changes: list[Change],
    window: int,
    goodput: Goodput,
) -> str:
    minutes = (rows[-1]["time"] - rows[0]["time"]) / 60
    steps = rows[-1]["step"]
    lines = [
        f"# {config['name']}",
        "",
        f"{config['algorithm']['name'].upper()}, {steps} of {config['training']['steps']} steps, "
        f"{minutes:.1f} minutes from the first line of metrics to the last.",
        "",
        "![metrics over steps](report.png)",
        "",
        "## What was run",
        "",
        *markdown_table(("key", "value"), _essentials(config)),
        "",
        "## First and last",
        "",
        f"Metrics of the first and the last {_steps_text(window)}{', averaged' if window > 1 else ''}; evaluations are "
        "the first and the last one.",
        "",
        *markdown_table(
            ("metric", "first", "last"),
            [(c.name, number(c.first), number(c.last)) for c in changes if suite_of(c.name) is None],
        ),
    ]
    lines += _suites_section(changes)
    stages = _stages(rows)
    if stages:
        total = sum(stages.values()) or 1.0
        table = [(name, f"{seconds:.2f}", f"{seconds / total:.0%}") for name, seconds in stages.items()]
        lines += ["", "## Seconds per step", "", *markdown_table(("stage", "seconds", "share"), table)]
        lines += _goodput_section(goodput)
    lines += _alarm_section(rows)
    lines += _trajectory_section(TrajectoryStore(run_dir / "trajectories"))
    lines += ["", "## Files", "", *(f"- `{name}`" for name in _files(run_dir)), ""]
    return "\n".join(lines)


def _suites_section(changes: Sequence[Change]) -> list[str]:
    """A row for each suite beside evaluation.data: its figures at the first and the last evaluation."""
    suites: dict[str, dict[str, Change]] = {}
    for change in changes:
        if (suite := suite_of(change.name)) is not None:
            suites.setdefault(suite, {})[change.name.rpartition("/")[2]] = change
    if not suites:
        return []
    figures = list(dict.fromkeys(figure for found in suites.values() for figure in found))

    def cell(change: Change | None) -> str:
        if change is None:
            return "-"
        first, last = number(change.first), number(change.last)
        return first if first == last else f"{first} → {last}"

    rows = [(suite, *(cell(found.get(figure)) for figure in figures)) for suite, found in suites.items()]
    return ["", "## Suites", "", "First and last evaluation.", "", *markdown_table(("suite", *figures), rows)]


def _goodput_section(goodput: Goodput) -> list[str]:
    table = markdown_table(("went into", "seconds", "share"), goodput_rows(goodput))
    return ["", "## Where the time went", "", goodput_notes(goodput), "", *table]


def _alarm_section(rows: list[dict[str, Metric]]) -> list[str]:
    """When which rule of the alarm fired; nothing where none did."""
    fired: dict[str, list[int]] = {}
    for row in rows:
        for rule in str(row.get("alarm/rules") or "").split(", "):
            fired.setdefault(rule, []).append(row["step"])
    fired.pop("", None)
    table = [(rule, str(steps[0]), str(steps[-1]), str(len(steps))) for rule, steps in fired.items()]
    if not table:
        return []
    header = ("rule", "first step", "last step", "steps")
    return ["", "## Alarms", "", "Early warnings of a collapse.", "", *markdown_table(header, table)]


def _trajectory_section(store: TrajectoryStore) -> list[str]:
    steps = store.steps()
    trajectories = store.read(steps[-1]) if steps else []
    if not trajectories:
        return []
    best = max(trajectories, key=lambda trajectory: trajectory.reward)
    return [
        "",
        f"## The best completion of step {steps[-1]}",
        "",
        f"Prompt {best.prompt_id}, reference answer `{best.answer}`, reward {best.reward:g}{_terms_text(best)}, "
        f"{best.length} tokens, ended by {best.finish_reason}.",
        "",
        *(f"    {line}" for line in best.text[:_EXAMPLE_CHARACTERS].splitlines()),
        *(["    ..."] if len(best.text) > _EXAMPLE_CHARACTERS else []),
    ]


def _terms_text(trajectory: Trajectory) -> str:
    terms = ", ".join(f"{name} {value:g}" for name, value in trajectory.reward_terms.items())
    return f" ({terms})" if terms else ""


def _essentials(config: dict[str, Any]) -> list[tuple[str, str]]:
    hidden = _NOT_FOR.get(config["algorithm"]["name"], ())
    pairs = []
    for key in _ESSENTIALS:
        section, name = key.split(".")
        value = config.get(section, {}).get(name)
        if value is not None and not key.startswith(hidden):
            pairs.append((f"`{key}`", f"`{value}`"))
    return pairs


def _files(run_dir: Path) -> list[str]:
    names = {
        path.name + ("/" if path.is_dir() else "")
        for path in run_dir.iterdir()
        if not path.name.startswith(".")
    }
    return sorted(names | {"summary.md"})


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        f"| {' | '.join(cells)} |"
        for cells in (
            header,
            ("---",) * len(header),
            *(tuple(c.replace("|", r"\|") for c in row) for row in rows),
        )
    ]


def _print(
    console: Console,
    run_dir: Path,
    rows: list[dict[str, Metric]],
    changes: list[Change],
    window: int,
    goodput: Goodput,
) -> None:
    table = Table(title=f"{run_dir.name}: step {rows[-1]['step']}", title_justify="left")
    table.add_column("metric")
    table.add_column(f"first {_steps_text(window)}", justify="right")
    table.add_column(f"last {_steps_text(window)}", justify="right")
    for change in changes:
        table.add_row(change.name, number(change.first), number(change.last))
    console.print(table)
    if goodput.stages:
        times = Table(title="where the time went", title_justify="left", caption=goodput_notes(goodput))
        times.add_column("went into")
        times.add_column("seconds", justify="right")
        times.add_column("share", justify="right")
        for line in goodput_rows(goodput):
            times.add_row(*line)
        console.print(times)
    for name in ("summary.md", "report.png"):
        console.print(str(run_dir / name), markup=False, highlight=False, soft_wrap=True)


def _steps_text(window: int) -> str:
    return "step" if window == 1 else f"{window} steps"


def number(value: float) -> str:
    """A figure of a table."""
    if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
