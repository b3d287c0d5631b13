"""Three kills, one of each kind, and a resumed run's whole metrics; tools/chaos.py does as many as one likes."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.run.verify_resume import Training, compare, short_copy, verify_resume

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.soak
def test_a_run_killed_three_times_gives_the_same_metrics() -> None:
    done = subprocess.run(
        [sys.executable, "tools/chaos.py", "--kills", "3", "--steps", "6", "--seed", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills: 1 in a step, 1 in a save, 1 at the start" in done.stdout
    assert "0 differ" in done.stdout


@pytest.mark.soak
def test_verify_resume_starts_at_the_newest_checkpoint_and_leaves_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    chaos = runpy.run_path(str(REPOSITORY / "tools" / "chaos.py"))
    recipe = short_copy(chaos["tiny_run"](tmp_path, 2), tmp_path, "run", 2)
    Training(recipe).finish()
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report = verify_resume(run, steps=2)
    assert (report.start, report.steps, report.killed_after) == (2, 2, 1)
    assert report.exact and report.compared > 20, report.summary()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


ROW = {
    "step": 1,
    "time": 5.0,
    "loss": 0.5,
    "seconds/rollout": 1.0,
    "memory/peak_gib": 2.0,
    "tokens_per_second": 9.0,
}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"time": 6.0, "seconds/rollout": 2.0, "memory/peak_gib": 3.0, "tokens_per_second": 1.0}, []),
        ({"loss": 0.5000000001}, ["loss"]),
        ({"loss": None}, ["loss"]),
        ({"new": 1.0}, ["new"]),
    ],
)
def test_comparison_leaves_out_only_times_and_memory(change: dict[str, Any], differs: list[str]) -> None:
    report = compare([ROW], [ROW | change])
    assert [d.metric for d in report.differences] == differs
    assert report.exact == (not differs)


def test_a_step_that_is_missing_or_doubled_is_a_difference() -> None:
    rows = [ROW, ROW | {"step": 2}]
    assert not compare(rows, rows[:1]).exact
    assert not compare(rows, [*rows, rows[1]]).exact
    assert compare(rows, rows).exact
