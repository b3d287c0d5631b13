"""The collapse alarm: each rule on a history made for it, silence on healthy ones, and two recorded runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import AlarmConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.alarm import RULES, AlarmWatch, alarms
from gtpo_megatron.run.metrics import read_metrics
from tools.alarm_rates import collapse_step, judge, main, summary

RECORDED = Path(__file__).parents[1] / "fixtures" / "alarm"
CONFIG = AlarmConfig()
START = {
    "loss": 0.1,
    "entropy/mean": 0.5,
    "response/length_mean": 100.0,
    "response/truncated": 0.05,
    "response/repetition": 0.02,
    "reward/mean": 1.0,
    "reward/paper_format": 0.8,
    "grad_norm": 2.0,
    "groups/no_signal": 0.1,
    "logprob_gap/mean": 1e-3,
}


def history(steps: int = 20, **late: Any) -> list[dict[str, Any]]:
    """Steps at the start's values; from step 10 on those of `late` (with / as __)."""
    changed = {name.replace("__", "/"): value for name, value in late.items()}
    return [{"step": k + 1} | START | (changed if k >= 10 else {}) for k in range(steps)]


def fired(rows: list[dict[str, Any]], config: AlarmConfig = CONFIG) -> list[str]:
    return [alarm.rule for alarm in alarms(rows, config)]


@pytest.mark.parametrize(
    ("late", "rules"),
    [
        ({"entropy__mean": 0.66}, ["entropy"]),
        ({"entropy__mean": 0.60}, []),
        ({"entropy__mean": 0.04}, ["entropy"]),
        ({"entropy__mean": 0.06}, []),
        ({"response__length_mean": 160.0}, ["length"]),
        ({"response__length_mean": 60.0}, ["length"]),
        ({"response__length_mean": 140.0}, []),
        ({"response__truncated": 0.2}, ["truncated"]),
        ({"response__truncated": 0.1}, []),
        ({"response__repetition": 0.3}, ["repetition"]),
        ({"reward__paper_format": 0.6}, ["format"]),
        ({"reward__paper_format": 0.7}, []),
        ({"grad_norm": 21.0}, ["grad_norm"]),
        ({"groups__no_signal": 0.95}, ["no_signal"]),
        ({"groups__no_signal": 0.95, "reward__mean": 2.0}, []),  # solved
        ({"logprob_gap__mean": 0.03}, ["logprob_gap"]),
        ({"logprob_gap__mean": 0.015}, []),  # 15 times the start's, and still rounding
        ({"entropy__mean": 0.7, "response__truncated": 0.9}, ["entropy", "truncated"]),
    ],
)
def test_rules(late: dict[str, float], rules: list[str]) -> None:
    assert fired(history(**late)) == rules


def test_a_rise_over_ln_2_fires_whatever_its_factor() -> None:
    rows = [{"loss": 0.0, "entropy/mean": 0.65 if k < 10 else 0.70} for k in range(20)]
    (alarm,) = alarms(rows, CONFIG)
    assert 0.65 < math.log(2) < 0.70 and CONFIG.entropy_rise > 0.70 / 0.65
    assert "rose over ln 2" in alarm.text and "0.7 nats" in alarm.text


def test_a_rule_that_is_off_or_not_known_is_silent() -> None:
    late = {"entropy__mean": 5.0, "response__length_mean": 900.0, "response__truncated": 1.0}
    late |= {"response__repetition": 1.0, "reward__paper_format": 0.0, "grad_norm": 1e3}
    late |= {"groups__no_signal": 1.0, "logprob_gap__mean": 1.0}
    assert fired(history(**late)) == list(RULES)
    off = {name: 0 for name, f in AlarmConfig.model_fields.items() if f.annotation is float}
    assert fired(history(**late), AlarmConfig(**off)) == []
    assert fired(history(**late), AlarmConfig(action="off")) == []
    assert fired([{"loss": 0.1}] * 20) == []
    nothing_measured = [row | {"grad_norm": None if k > 4 else 2.0} for k, row in enumerate(history())]
    assert fired(nothing_measured) == []


def test_a_single_outlier_is_averaged_and_steps_without_a_value_do_not_count() -> None:
    rows = history()
    rows[-1]["response/length_mean"] = 200.0
    assert fired(rows) == []
    rows[-2]["response/length_mean"] = rows[-3]["response/length_mean"] = None
    assert fired(rows) == ["length"]


def test_nothing_is_said_before_there_is_something_to_compare() -> None:
    rows = [START | {"entropy/mean": 0.1 if k < 5 else 2.0} for k in range(8)]
    assert [fired(rows[:k]) for k in (5, 7)] == [[], []]
    assert fired(rows) == ["entropy"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_a_level_is_silent(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(1.0, 0.05, (200, len(START)))
    rows = [{name: value * f for (name, value), f in zip(START.items(), row, strict=True)} for row in noise]
    assert not any(fired(rows[:k]) for k in range(1, 201))


def test_a_watch_says_each_alarm_when_it_begins(recorded: Callable[[str], list[dict[str, Any]]]) -> None:
    rows = recorded("collapsed")
    watch, said = AlarmWatch(CONFIG), {}
    for row in rows:
        metrics, new = watch.step(row)
        assert metrics["alarm/firing"] == len([r for r in metrics["alarm/rules"].split(", ") if r])
        for alarm in new:
            said.setdefault(row["step"], []).append(alarm.rule)
    verdict = judge("collapsed", rows, CONFIG, "reward/mean", 0.15)
    assert min(said) == verdict.first_alarm
    # a process that goes on after a stop has seen what the first one saw
    resumed = AlarmWatch(CONFIG, [{"step": 0, "eval/accuracy": 0.3}, *rows[:-1]])
    assert resumed.step(rows[-1])[0] == metrics


@pytest.fixture
def recorded() -> Callable[[str], list[dict[str, Any]]]:
    return lambda name: read_metrics(RECORDED / f"{name}.jsonl")


def test_recorded_runs(recorded: Callable[[str], list[dict[str, Any]]]) -> None:
    """GRPO on sums at a learning rate of 1e-3, which destroyed the policy, and at 3e-4, which trained it."""
    bad, good = (judge(n, recorded(n), CONFIG, "reward/mean", 0.15) for n in ("collapsed", "healthy"))
    assert bad.collapse == 21 and bad.lead > 0 and {"entropy", "truncated", "format"} <= bad.by_rule.keys()
    assert good.collapse is None and good.first_alarm is None and good.firing_steps == 0
    figures = summary([bad, good])
    assert (figures["healthy_runs_with_an_alarm"], figures["collapsed_runs_warned_before"]) == (0, 1)
    assert figures["lead_steps"] == [bad.lead]


def test_stop_waits_for_patience() -> None:
    watch = AlarmWatch(AlarmConfig(action="stop", patience=3))
    for row in history(steps=14, grad_norm=100.0):
        watch.step(row)
        if row["step"] < 13:
            watch.check(row["step"])
    with pytest.raises(UserError, match=r"step 14: stopped by the alarm \(grad_norm for 3 steps"):
        watch.check(14)
    warn = AlarmWatch(AlarmConfig(patience=1), history())
    warn.step(START | {"grad_norm": 1e4})
    warn.check(21)


def test_when_a_run_has_collapsed() -> None:
    assert collapse_step([1.0] * 10, 0.15) is None
    assert collapse_step([1.0] * 10 + [0.0] * 5, 0.15) == 11  # one of five is missing
    assert collapse_step([1.0] * 10 + [0.5] * 5, 0.15) == 12
    assert collapse_step(list(np.linspace(0, 1, 50)), 0.15) is None


def test_the_tool_reads_folders_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("collapsed", "healthy"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        text = (RECORDED / f"{name}.jsonl").read_text()
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    main([str(tmp_path / "runs"), "--json", str(tmp_path / "rates.json"), "alarm.entropy_rise=0"])
    assert "| healthy | 80 |  |  |  |  |" in capsys.readouterr().out
    content = json.loads((tmp_path / "rates.json").read_text())
    assert [run["run"] for run in content["runs"]] == ["collapsed", "healthy"]
    assert content["summary"]["by_rule"]["entropy"]["warned"] == 0
    with pytest.raises(UserError, match="no run with steps enough"):
        main([str(tmp_path / "runs"), "--metric", "reward/nothing"])
