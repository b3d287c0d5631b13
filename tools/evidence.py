"""The experiments of docs/evidence.md: run their sweeps, collect what the runs left, and make the page's tables and figures.

run      train the sweeps by `gtpo-megatron sweep`, and note the processor time that they took
collect  from the runs' own files to docs/results/evidence/<sweep>.json
render   from these to the tables of docs/evidence.md and docs/results/evidence/<sweep>.png
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.sweep.design import Planned, load_sweep
from gtpo_megatron.sweep.effects import Interval, mean_interval, paired_effect, share_interval
from gtpo_megatron.sweep.outcomes import LN2, read_outcome, running_mean, series
from gtpo_megatron.sweep.runner import is_complete

ROOT = Path(__file__).parents[1]
SWEEPS = ROOT / "recipes" / "sweeps"
RESULTS = ROOT / "docs" / "results" / "evidence"
PAGE = ROOT / "docs" / "evidence.md"
START, TUNING, TUNED = "evidence-start", "evidence-tuning", "evidence-sums"
NAMES = (TUNING, TUNED, "evidence-harsh", "evidence-format")  # those whose results are collected
# arm -> the arm that it is compared with, seed by seed: predeclared in docs/evidence.md
AGAINST = {
    "gtpo": "grpo",
    "grpo-kl-1e-2": "grpo",
    "grpo-kl-1e-6": "grpo",
    "grpo-no-std": "grpo",
    "grpo-authors-betas": "grpo",
    "gtpo-no-gate": "gtpo",
    "gtpo-no-protection": "gtpo",
    "gtpo-no-amplification": "gtpo",
    "gtpo-no-entropy-term": "gtpo",
    "gtpo-authors-betas": "gtpo",
    "gtpo-protection-half": "gtpo",
}
MEASURES = {
    "accuracy": "accuracy",
    "pass_at_k": "pass@8",
    "format": "format",
    "reward_late": "reward, last 10 steps",
    "entropy_late": "entropy, last 10 steps",
    "entropy_highest": "highest entropy",
}
TABLE = r"(?<=<!-- {} -->\n).*?(?=<!-- end of table -->)"
Sweep = dict[str, Any]  # what a JSON file has


def run(names: Sequence[str], jobs: int, only: Sequence[str], overrides: Sequence[str], cost: Path) -> int:
    """Train the sweeps one after another; the highest exit code. Resumable. `cost` gathers processor seconds by sweep."""
    worst = 0
    for name in names:
        before = _processor_seconds()
        command = ["-m", "gtpo_megatron", "sweep", str(SWEEPS / f"{name}.yaml"), "--jobs", str(jobs)]
        code = subprocess.run(
            [sys.executable, *command, *(f"--only={part}" for part in only), *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).returncode
        spent = json.loads(cost.read_text()) if cost.exists() else {}
        spent[name] = round(spent.get(name, 0.0) + _processor_seconds() - before, 1)
        _write(cost, json.dumps(spent, indent=1) + "\n")
        worst = max(worst, code)
    return worst


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def collect(planned: Sequence[Planned]) -> Sweep:
    """The outcomes and curves of a sweep's complete runs: arm -> seed -> what it came to. JSON-able."""
    arms: dict[str, dict[str, Any]] = {}
    for one in filter(is_complete, planned):
        rows = [row for row in read_metrics(one.config.path / "metrics.jsonl") if "reward/mean" in row]
        arm = arms.setdefault(arm_of(one), {"rate": one.config.optimizer.lr, "seeds": {}})
        arm["seeds"][str(one.config.training.seed)] = {
            "outcome": {name: round(value, 5) for name, value in read_outcome(one).as_dict().items()},
            "entropy": [round(value, 4) for value in series(rows, "entropy/mean")],
            "reward": [round(value, 3) for value in series(rows, "reward/mean")],
            "seconds": round(
                sum(float(v or 0) for row in rows for k, v in row.items() if k[:8] == "seconds/"), 1
            ),
        }
    return {
        "planned": len(planned),
        "complete": sum(len(arm["seeds"]) for arm in arms.values()),
        "steps": planned[0].config.training.steps,
        "arms": arms,
    }


def arm_of(one: Planned) -> str:
    """The labels of a run but for its seed."""
    return " ".join(label for axis, label in one.labels.items() if axis != "seed")


@dataclass(frozen=True)
class Contrast:
    """An arm and the one that it is compared with."""

    arm: str
    other: str


def contrasts(sweep: Sweep) -> Iterator[Contrast]:
    """The comparisons that are predeclared, of the arms that a sweep has; further labels are the same on both sides."""
    for arm in sweep["arms"]:
        *rest, own = arm.split(" ")
        other = " ".join([*rest, AGAINST.get(own, "")])
        if other in sweep["arms"]:
            yield Contrast(arm, other)


def values(sweep: Sweep, arm: str, measure: str) -> dict[int, float]:
    """Seed -> an outcome's number."""
    return {int(seed): one["outcome"][measure] for seed, one in sweep["arms"][arm]["seeds"].items()}


def tuned(tuning: Sweep) -> dict[str, float]:
    """Arm -> the rate with the highest late reward, over the seeds; the lower rate where two are equal."""
    best: dict[str, tuple[float, float]] = {}
    for label in tuning["arms"]:
        arm, rate = label.split(" ")[0], tuning["arms"][label]["rate"]
        reward = fmean(values(tuning, label, "reward_late").values())
        best[arm] = max(best.get(arm, (-1.0, 0.0)), (reward, -rate))
    return {arm: -rate for arm, (_, rate) in best.items()}


def arms_table(sweep: Sweep) -> list[str]:
    """A row an arm: means over seeds with Student's intervals, counts with Wilson's."""
    lines = [
        f"| arm | rate | seeds | {' | '.join(MEASURES.values())} | passed ln 2 | fell | both |",
        "| --- " * (6 + len(MEASURES)) + "|",
    ]
    for arm, found in sweep["arms"].items():
        cells = [_shown(mean_interval(list(values(sweep, arm, measure).values()))) for measure in MEASURES]
        passed, fell = (values(sweep, arm, measure) for measure in ("passes_ln2", "fell"))
        for hits in (passed, fell, {seed: passed[seed] * fell[seed] for seed in passed}):
            share = share_interval(round(sum(hits.values())), len(hits))
            cells.append(f"{sum(hits.values()):.0f} of {len(hits)} [{share.low:.2f}, {share.high:.2f}]")
        lines.append(f"| {arm} | {found['rate']:g} | {len(found['seeds'])} | {' | '.join(cells)} |")
    return lines


def effects_table(sweep: Sweep) -> list[str]:
    """A row a comparison: paired differences over seeds; bold where the interval excludes 0."""
    lines = [
        f"| difference | seeds | {' | '.join(MEASURES.values())} | d of accuracy | accuracy, bootstrap |",
        "| --- " * (4 + len(MEASURES)) + "|",
    ]
    for one in contrasts(sweep):
        effects = [
            paired_effect(values(sweep, one.arm, measure), values(sweep, one.other, measure))
            for measure in MEASURES
        ]
        cells = [_shown(effect.difference, "+") for effect in effects if effect]
        if not (main := effects[0]):  # no seed that both have
            continue
        cells.append("" if main.standardised is None else f"{main.standardised:+.2f}")
        cells.append(_shown(main.bootstrap, "+"))
        lines.append(f"| {one.arm} - {one.other} | {main.difference.seeds} | {' | '.join(cells)} |")
    return lines


def tuning_table(tuning: Sweep) -> list[str]:
    """A row an arm: the late reward at each rate, and what was chosen."""
    chosen = tuned(tuning)
    lines = ["| arm | reward, last 10 steps, by rate | chosen |", "| --- | --- | --- |"]
    for arm, rate in chosen.items():
        labels = [label for label in tuning["arms"] if label.split(" ")[0] == arm]
        rewards = [
            f"{fmean(values(tuning, label, 'reward_late').values()):.2f} ({tuning['arms'][label]['rate']:g})"
            for label in labels
        ]
        lines.append(f"| {arm} | {', '.join(rewards)} | {rate:g} |")
    return lines


def tables(name: str, sweep: Sweep) -> str:
    """The page's tables of a sweep, as Markdown."""
    done = f"{sweep['complete']} of {sweep['planned']} runs, {sweep['steps']} steps each."
    lines = tuning_table(sweep) if name == TUNING else [*arms_table(sweep), "", *effects_table(sweep)]
    return "\n".join([done, "", *lines]) + "\n"


def _shown(interval: Interval, sign: str = "") -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{sign}.3f}"
    text = f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return f"**{text}**" if sign and interval.excludes_zero else text


def updated(page: str, sweeps: Mapping[str, Sweep]) -> str:
    """The page with the tables of these sweeps."""
    for name, sweep in sweeps.items():
        text = tables(name, sweep).replace("\\", "\\\\")
        page = re.sub(TABLE.format(name), text, page, count=1, flags=re.DOTALL)
    return page


def plot(name: str, sweep: Sweep, path: Path) -> None:
    """Entropy over the steps, a line a seed and a bold mean an arm; and final accuracy, a dot a seed."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (arm, found) in enumerate(sweep["arms"].items()):
        curves = [running_mean(one["entropy"]) for one in found["seeds"].values()]
        colour = f"C{place % 10}"
        _curves(left, curves, arm, colour, "-" if place < 10 else "--")
        right.plot(
            list(values(sweep, arm, "accuracy").values()), [place] * len(curves), "o", color=colour, alpha=0.5
        )
        interval = mean_interval(list(values(sweep, arm, "accuracy").values()))
        right.plot([interval.mean], [place], "|", color="black", markersize=14)
    left.axhline(LN2, color="black", linestyle=":", linewidth=1)
    left.annotate("ln 2", (0, LN2), fontsize="small", va="bottom")
    left.set(title=f"{name}: entropy, running mean of 5 steps", xlabel="step", ylabel="nats")
    left.legend(fontsize="x-small")
    right.set_yticks(range(len(sweep["arms"])), list(sweep["arms"]), fontsize="small")
    right.invert_yaxis()
    right.set(title="accuracy on held-out prompts at the end, a dot a seed", xlabel="share")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _curves(axes: Axes, curves: Sequence[Sequence[float]], arm: str, colour: str, style: str) -> None:
    for curve in curves:
        axes.plot(curve, color=colour, alpha=0.15, linewidth=0.7)
    mean = [fmean(step) for step in zip(*curves, strict=True)]
    axes.plot(mean, style, color=colour, label=f"{arm} ({len(curves)})", linewidth=1.6)


def collect_all(names: Sequence[str], overrides: Sequence[str], results: Path) -> None:
    """Write the JSON file of each sweep that has complete runs; say where the rates are not those that tuning chose."""
    found = {name: load_sweep(SWEEPS / f"{name}.yaml", overrides) for name in names}
    for name, planned in found.items():
        sweep = collect(planned)
        print(f"{name}: {sweep['complete']} of {sweep['planned']} runs are complete")
        if sweep["complete"]:
            _write(results / f"{name}.json", json.dumps(sweep, separators=(",", ":")) + "\n")
    for line in untuned(results):
        print(line)


def untuned(results: Path) -> list[str]:
    """What evidence-sums.yaml has otherwise than tuning chose, a line an arm."""
    if not (results / f"{TUNING}.json").exists():
        return []
    chosen = tuned(json.loads((results / f"{TUNING}.json").read_text()))
    have = {arm_of(one): one.config.optimizer.lr for one in load_sweep(SWEEPS / f"{TUNED}.yaml")}
    return [
        f"{arm}: tuning chose a rate of {rate:g}, {TUNED}.yaml has {have[arm]:g}"
        for arm, rate in chosen.items()
        if arm in have and have[arm] != rate
    ]


def read_results(results: Path) -> dict[str, Sweep]:
    """The sweeps that have been collected."""
    paths = {name: results / f"{name}.json" for name in NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def render(results: Path, output: Path) -> None:
    """Write the figures beside the results, and the page with its tables to `output`.

    Raises:
        UserError: nothing has been collected.
    """
    sweeps = read_results(results)
    if not sweeps:
        raise UserError(f"{results}: nothing collected; run `tools/evidence.py collect` first")
    for name, sweep in sweeps.items():
        if name != TUNING:
            plot(name, sweep, results / f"{name}.png")
    _write(output, updated(PAGE.read_text(encoding="utf-8"), sweeps))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "collect", "render"))
    parser.add_argument("--sweep", action="append", choices=(START, *NAMES), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--only", action="append", default=[], help="only runs whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE, help="the page that render writes")
    parser.add_argument(
        "--cost", type=Path, default=Path("runs/evidence-cost.json"), help="processor seconds"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs")
    arguments = parser.parse_intermixed_args()
    names = arguments.sweep or ((START, *NAMES) if arguments.what == "run" else NAMES)
    try:
        if arguments.what == "run":
            return run(names, arguments.jobs, arguments.only, arguments.overrides, arguments.cost)
        if arguments.what == "collect":
            collect_all(names, arguments.overrides, arguments.results)
        else:
            render(arguments.results, arguments.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
