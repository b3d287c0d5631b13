"""The experiments of docs/evidence.md: a short form of all of it, and the committed page against its own figures."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gtpo_megatron.sweep.design import load_sweep

ROOT = Path(__file__).parents[2]
SHORT = ["training.steps=3", "rollout.prompts_per_step=1", "rollout.group_size=4", "evaluation.samples=2"]


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "tools" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a program of tools/ in tmp_path and in this process, which has imported all; what it and its children say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the runs that it starts
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def call(name: str, *arguments: str) -> str:
        path = str(ROOT / "tools" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, capfd.readouterr()
        return capfd.readouterr().out

    return call


@pytest.mark.soak
def test_from_nothing_to_a_page(tmp_path: Path, tool: Callable[..., str]) -> None:
    """One start policy, two arms, one seed; the same command leaves what is complete alone."""
    tool("make_evidence", "runs/evidence-inputs")
    short = ["training.steps=3", "optimizer.warmup_steps=1"]
    tool("evidence", "run", "--sweep", "evidence-start", "--only", "start-sums", *short)
    two = ["run", "--sweep", "evidence-sums", "--only", "po-seed100", "--jobs", "2", *SHORT]
    tool("evidence", *two)
    assert "2 of 2 runs are complete already" in tool("evidence", *two)
    spent = json.loads((tmp_path / "runs" / "evidence-cost.json").read_text())
    assert spent["evidence-start"] > 0 and spent["evidence-sums"] > 0

    said = tool("evidence", "collect", "--results", "results", *SHORT)
    assert "evidence-sums: 2 of 88 runs are complete" in said
    tool("evidence", "render", "--results", "results", "--output", "page.md")
    assert (tmp_path / "results" / "evidence-sums.png").stat().st_size > 10_000
    (results,) = (tmp_path / "results").glob("*.json")
    assert json.loads(results.read_text())["arms"].keys() == {"gtpo", "grpo"}
    assert "\n| gtpo - grpo | 1 |" in (tmp_path / "page.md").read_text()


def made(accuracy: dict[str, list[float]], rate: float = 1e-4, **more: list[float]) -> dict[str, object]:
    """A collected sweep of these arms, with one accuracy a seed."""

    def outcome(value: float, place: int) -> dict[str, float]:
        rest = dict.fromkeys(("pass_at_k", "format", "entropy_late", "entropy_highest", "reward_late"), value)
        return {"accuracy": value, **rest} | {name: numbers[place] for name, numbers in more.items()}

    arms = {
        arm: {
            "rate": rate,
            "seeds": {
                str(100 + i): {"outcome": outcome(v, i), "entropy": [0.5] * 6} for i, v in enumerate(of)
            },
        }
        for arm, of in accuracy.items()
    }
    return {"planned": 9, "complete": 6, "steps": 60, "arms": arms}


def test_tables(evidence: ModuleType) -> None:
    sweep = made(
        {"gtpo": [0.5, 0.6, 0.7], "grpo": [0.4, 0.51, 0.59], "grpo-no-std": [0.4, 0.5, 0.7]},
        passes_ln2=[1.0, 0.0, 1.0],
        fell=[0.0, 0.0, 1.0],
    )
    text = evidence.tables("evidence-sums", sweep)
    assert text.startswith("6 of 9 runs, 60 steps each.")
    assert "| gtpo | 0.0001 | 3 | 0.600 [0.352, 0.848] |" in text
    assert "2 of 3 [0.21, 0.94] | 1 of 3 [0.06, 0.79] | 1 of 3 [0.06, 0.79] |" in text
    assert "| gtpo - grpo | 3 | **+0.100 [+0.075, +0.125]** |" in text
    assert "| +10.00 | **+0.100 [+0.090, +0.110]** |" in text
    assert "| grpo-no-std - grpo | 3 | +0.033" in text  # its interval holds 0: not bold


def test_tables_take_the_place_of_the_last_ones(evidence: ModuleType) -> None:
    page = "a\n<!-- evidence-sums -->\n<!-- end of table -->\nb\n<!-- evidence-harsh -->\nc\n<!-- end of table -->\n"
    sweep = made({"gtpo": [0.5]}, passes_ln2=[0.0], fell=[0.0])
    once = evidence.updated(page, {"evidence-sums": sweep})
    table = evidence.tables("evidence-sums", sweep)
    assert once == page.replace("<!-- evidence-sums -->\n", f"<!-- evidence-sums -->\n{table}")
    assert evidence.updated(once, {"evidence-sums": sweep}) == once


def test_comparisons_keep_the_other_labels(evidence: ModuleType) -> None:
    sweep = made(
        {"half gtpo": [0.5], "half grpo": [0.5], "rare gtpo": [0.5], "rare gtpo-no-protection": [0.5]}
    )
    assert [(one.arm, one.other) for one in evidence.contrasts(sweep)] == [
        ("half gtpo", "half grpo"),
        ("rare gtpo-no-protection", "rare gtpo"),
    ]


def test_tuning_takes_the_better_rate_and_the_lower_of_equals(evidence: ModuleType) -> None:
    low = made({"gtpo low": [1.0, 2.0], "grpo low": [1.0, 1.0]})
    high = made({"gtpo high": [2.0, 2.0], "grpo high": [1.0, 1.0]}, rate=3e-4)
    both = {**low, "arms": {**low["arms"], **high["arms"]}}
    assert evidence.tuned(both) == {"gtpo": 3e-4, "grpo": 1e-4}
    assert "| gtpo | 1.50 (0.0001), 2.00 (0.0003) | 0.0003 |" in evidence.tables("evidence-tuning", both)


def test_every_arm_has_what_it_is_compared_with(evidence: ModuleType) -> None:
    for name in evidence.NAMES[1:]:
        arms = {evidence.arm_of(one) for one in load_sweep(evidence.SWEEPS / f"{name}.yaml")}
        compared = {one.arm for one in evidence.contrasts({"arms": dict.fromkeys(arms)})}
        assert {arm for arm in arms - compared if not arm.endswith("grpo")} == set()


def test_the_committed_page_is_made_of_the_committed_figures(evidence: ModuleType) -> None:
    sweeps = evidence.read_results(evidence.RESULTS)
    page = evidence.PAGE.read_text(encoding="utf-8")
    assert "evidence-tuning" in sweeps
    assert evidence.updated(page, sweeps) == page, "run tools/evidence.py render"


def test_the_rates_are_those_that_tuning_chose(evidence: ModuleType) -> None:
    assert evidence.untuned(evidence.RESULTS) == []
