"""Several runs beside each other: metrics overlaid, the seeds of one recipe as their mean and a band."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gtpo_megatron.analysis.figures import plot_recipes, series, suite_of
from gtpo_megatron.analysis.report import NEEDED, markdown_table, number
from gtpo_megatron.config.loading import read_recorded
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import Metric, read_metrics

_SEED = re.compile(r"[-_.]?seed[-_.]?\d+")
_NOT_THE_RECIPE = ("name", "dir", "logging")  # and training.seed
MAIN = (
    "eval/accuracy",
    "eval/format",
    "reward/mean",
    "entropy/mean",
    "response/length_mean",
    "response/truncated",
    "groups/no_signal",
    "conflict/protected_share",
    "conflict/amplified_share",
    "grad_norm",
    "logprob_gap/mean",
    "tokens_per_second",
)
_WINDOW = 5  # steps at the start and at the end that are averaged


@dataclass(frozen=True)
class RecordedRun:
    """A run as it lies on the disk."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Metric]]

    @property
    def seed(self) -> int | None:
        """`training.seed`."""
        return self.config.get("training", {}).get("seed")


@dataclass(frozen=True)
class Recipe:
    """Runs whose configurations differ in seed, name and logging alone."""

    label: str
    runs: tuple[RecordedRun, ...]

    def band(self, metric: str) -> tuple[list[int], np.ndarray]:
        """(steps that all runs have, values [runs, steps]); nothing where a run lacks the metric."""
        found = [dict(zip(*series(run.rows, metric), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*(set(values) for values in found)))
        return steps, np.array([[values[step] for step in steps] for values in found])


def compare_runs(run_dirs: Sequence[Path], folder: Path, console: Console | None = None) -> Path:
    """Write `comparison.md` and `comparison.png` into a folder, print the main table, and return the former's path.

    Args:
        run_dirs: directories of two runs or more.
        folder: made if it is not there.

    Raises:
        UserError: a directory is no run's or given twice, holds no step yet, or one of its files is damaged.
    """
    recipes = recipes_of([_read(path) for path in run_dirs])
    found = {n for recipe in recipes for run in recipe.runs for row in run.rows for n in row if _shown(n)}
    suites = sorted(name for name in found if suite_of(name) is not None and name.endswith("/accuracy"))
    main = [*MAIN[:2], *suites, *MAIN[2:]]
    names = [name for name in main if any(recipe.band(name)[0] for recipe in recipes)]
    others = sorted(found - set(names))
    folder.mkdir(parents=True, exist_ok=True)
    plot_recipes(recipes, names, folder / "comparison.png")
    text = _page(recipes, names, others)
    target = folder / "comparison.md"
    temporary = folder / ".comparison.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    _print(console or Console(), recipes, names)
    return target


def recipes_of(runs: Sequence[RecordedRun]) -> list[Recipe]:
    """The runs by recipe, in order of appearance; a recipe's runs in order of their seeds.

    Raises:
        UserError: a run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise UserError(f"{min(twice)}: given twice; each run counts once")
    found: dict[str, list[RecordedRun]] = {}
    for run in runs:
        found.setdefault(repr(sorted(_flat(_recipe(run.config)).items())), []).append(run)
    recipes = []
    for members in found.values():
        members.sort(key=lambda run: (run.seed is not None, run.seed))
        label = _SEED.sub("", members[0].path.name) if len(members) > 1 else members[0].path.name
        taken = {recipe.label for recipe in recipes}
        recipes.append(Recipe(label if label not in taken else str(members[0].path), tuple(members)))
    return recipes


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[str]]]:
    """Keys of the configuration in which recipes differ, and the value of each recipe; "-" where it has none."""
    flat = [_flat(_recipe(recipe.runs[0].config)) for recipe in recipes]
    keys = sorted({key for one in flat for key in one})
    return [
        (key, [str(one.get(key, "-")) for one in flat])
        for key in keys
        if len({repr(one.get(key)) for one in flat}) > 1
    ]


def _read(path: Path) -> RecordedRun:
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"{path}: no metrics.jsonl there; give the directories of runs, e.g. runs/quickstart")
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path / 'metrics.jsonl'}: no step is finished yet, so there is nothing to compare")
    return RecordedRun(path, read_recorded(path / "config.yaml", NEEDED), rows)


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if key not in _NOT_THE_RECIPE}
    if isinstance(rest.get("training"), dict):
        rest["training"] = {key: value for key, value in rest["training"].items() if key != "seed"}
    return rest


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(name: str) -> bool:
    return name not in ("step", "time") and not name.startswith(("seconds/", "alarm/"))


def ends(recipe: Recipe, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last values of each run [runs]: means of a few steps, of an evaluation its own; None if a run lacks them."""
    steps, values = recipe.band(metric)
    if not steps:
        return None
    window = 1 if metric.startswith("eval/") else max(1, min(_WINDOW, len(steps) // 4))
    return values[:, :window].mean(1), values[:, -window:].mean(1)


def _spread(values: np.ndarray) -> str:
    mean = number(float(values.mean()))
    return (
        mean
        if len(values) == 1
        else f"{mean} ({number(float(values.min()))} to {number(float(values.max()))})"
    )


def _rows(recipes: Sequence[Recipe], names: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for name in names:
        cells = [ends(recipe, name) for recipe in recipes]
        if any(cell is not None for cell in cells):
            shown = ("-" if c is None else f"{_spread(c[0])} → {_spread(c[1])}" for c in cells)
            rows.append((name, *shown))
    return rows


def _page(recipes: Sequence[Recipe], names: Sequence[str], others: Sequence[str]) -> str:
    labels = [recipe.label for recipe in recipes]
    members = [
        (
            recipe.label,
            ", ".join(str(run.seed) for run in recipe.runs),
            f"{recipe.band('loss')[0][-1] if recipe.band('loss')[0] else 0}",
            ", ".join(f"`{run.path}`" for run in recipe.runs),
        )
        for recipe in recipes
    ]
    lines = [
        "# Comparison",
        "",
        "![metrics over steps](comparison.png)",
        "",
        *markdown_table(("recipe", "seeds", "steps that all have", "runs"), members),
        "",
        "Runs are of one recipe where their configurations differ in seed, name and logging alone. Over several seeds: the mean, "
        "and the lowest and the highest seed, at steps that all of them have. First and last are means of up to "
        f"{_WINDOW} steps, of evaluations the first and the last one.",
    ]
    if differing := differences(recipes):
        table = [(f"`{key}`", *(f"`{value}`" for value in values)) for key, values in differing]
        lines += ["", "## What differs", "", *markdown_table(("key", *labels), table)]
    lines += ["", "## First and last", "", *markdown_table(("metric", *labels), _rows(recipes, names))]
    lines += ["", "## Other metrics", "", *markdown_table(("metric", *labels), _rows(recipes, others)), ""]
    return "\n".join(lines)


def _print(console: Console, recipes: Sequence[Recipe], names: Sequence[str]) -> None:
    table = Table(title="first → last; of several seeds mean (lowest to highest)", title_justify="left")
    table.add_column("metric")
    for recipe in recipes:
        seeds = f" ({len(recipe.runs)} seeds)" if len(recipe.runs) > 1 else ""
        table.add_column(f"{recipe.label}{seeds}", justify="right")
    for row in _rows(recipes, names):
        table.add_row(*row)
    console.print(table)
