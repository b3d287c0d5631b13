#!/usr/bin/env python
"""False alarms of the collapse alarm on healthy runs, and its lead time on collapsing ones, from folders of recorded runs.

tools/alarm_rates.py runs/a runs/b ...                  a table, a line a run
tools/alarm_rates.py FOLDER_OF_RUNS --json rates.json   the figures, too
tools/alarm_rates.py RUNS alarm.entropy_rise=2          other thresholds

A run has collapsed where the mean of --metric over 5 steps falls below (1 - --drop) of its best such mean before; the step
where it first does is the collapse. The alarm does not look at that metric to warn (docs/alarm.md).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.config import AlarmConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.alarm import RULES, alarms
from gtpo_megatron.run.metrics import read_metrics

WINDOW = 5


@dataclass(frozen=True)
class Verdict:
    """What became of a run, and when the alarm said so; steps count from 1."""

    run: str
    steps: int
    collapse: int | None  # the step
    first_alarm: int | None
    by_rule: dict[str, int]  # rule -> the step where it first fired
    firing_steps: int  # steps on which any rule fired

    @property
    def lead(self) -> int | None:
        """Steps from the first alarm to the collapse; negative where it came after."""
        known = self.collapse is not None and self.first_alarm is not None
        return self.collapse - self.first_alarm if known else None


def collapse_step(values: Sequence[float], drop: float) -> int | None:
    """The first step, from 1, after which the mean of 5 steps stands below (1 - drop) of its best before; None: never."""
    means = np.convolve(np.asarray(values, np.float64), np.full(WINDOW, 1 / WINDOW), "valid")
    best = np.maximum.accumulate(means)
    below = np.flatnonzero(means < (1 - drop) * best)
    return int(below[0]) + WINDOW if len(below) else None


def judge(
    name: str, rows: Sequence[Mapping[str, Any]], config: AlarmConfig, metric: str, drop: float
) -> Verdict:
    """The verdict on a run's metrics, the alarm asked after every step with what was known then."""
    history = [row for row in rows if metric in row and row[metric] is not None and "loss" in row]
    by_rule: dict[str, int] = {}
    firing = 0
    for step in range(1, len(history) + 1):
        found = alarms(history[:step], config)
        firing += bool(found)
        for alarm in found:
            by_rule.setdefault(alarm.rule, step)
    collapse = collapse_step([row[metric] for row in history], drop) if len(history) >= WINDOW else None
    return Verdict(name, len(history), collapse, min(by_rule.values(), default=None), by_rule, firing)


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """False-alarm rate of healthy runs, and lead times of collapsed ones, in all and by rule."""
    healthy = [v for v in verdicts if v.collapse is None]
    collapsed = [v for v in verdicts if v.collapse is not None]
    steps = sum(v.steps for v in healthy)
    rules = {}
    for rule in RULES:
        leads = [v.collapse - v.by_rule[rule] for v in collapsed if rule in v.by_rule]
        rules[rule] = {
            "false_alarms": sum(rule in v.by_rule for v in healthy),
            "warned": len(leads),
            "lead_median": float(np.median(leads)) if leads else None,
        }
    leads = [v.lead for v in collapsed if v.lead is not None]
    return {
        "healthy_runs": len(healthy),
        "healthy_runs_with_an_alarm": sum(v.first_alarm is not None for v in healthy),
        "healthy_steps": steps,
        "healthy_steps_with_an_alarm": sum(v.firing_steps for v in healthy),
        "collapsed_runs": len(collapsed),
        "collapsed_runs_with_an_alarm": len(leads),
        "collapsed_runs_warned_before": sum(lead > 0 for lead in leads),
        "lead_steps": sorted(leads),
        "lead_median": float(np.median(leads)) if leads else None,
        "by_rule": rules,
    }


def runs_in(paths: Sequence[Path]) -> list[Path]:
    """Directories of runs among the paths and below them."""
    found = [path for path in paths if (path / "metrics.jsonl").is_file()]
    for path in paths:
        if path not in found:
            found += sorted(file.parent for file in path.rglob("metrics.jsonl"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", help="directories of runs, folders of them, and alarm.KEY=VALUE")
    parser.add_argument("--metric", default="reward/mean", help="what collapses (default: %(default)s)")
    parser.add_argument("--drop", type=float, default=0.15, help="by which share (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_intermixed_args(arguments)
    settings = dict(p.removeprefix("alarm.").split("=", 1) for p in given.paths if p.startswith("alarm."))
    config = AlarmConfig.model_validate(settings)
    paths = runs_in([Path(p) for p in given.paths if not p.startswith("alarm.")])
    verdicts = []
    for path in paths:
        verdict = judge(path.name, read_metrics(path / "metrics.jsonl"), config, given.metric, given.drop)
        if verdict.steps >= config.baseline + WINDOW:
            verdicts.append(verdict)
    if not verdicts:
        raise UserError(f"no run with steps enough that have {given.metric}")
    print("| run | steps | collapse | first alarm | lead | rules, first step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for v in verdicts:
        fired = ", ".join(
            f"{rule} {step}" for rule, step in sorted(v.by_rule.items(), key=lambda item: item[1])
        )
        cells = (v.run, v.steps, v.collapse, v.first_alarm, v.lead, fired)
        print(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    figures = summary(verdicts)
    print(json.dumps(figures, indent=2))
    if given.json is not None:
        content = {"summary": figures, "runs": [asdict(v) | {"lead": v.lead} for v in verdicts]}
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
