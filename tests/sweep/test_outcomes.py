"""What a run came to, from the lines of its metrics."""

import json
from pathlib import Path

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.sweep.design import Planned
from gtpo_megatron.sweep.outcomes import outcome, read_outcome, running_mean

Rows = list[dict[str, float | None]]


def lines(entropy: list[float], reward: list[float], before: float, after: float) -> Rows:
    steps: Rows = [
        {"step": i + 1, "entropy/mean": h, "reward/mean": r, "gate/pass_rate": 0.75}
        for i, (h, r) in enumerate(zip(entropy, reward, strict=True))
    ]
    first = {"step": 0, "eval/accuracy": before, "eval/format": 1.0, "eval/pass@8": 0.9}
    last = {"step": len(steps), "eval/accuracy": after, "eval/format": 0.5, "eval/pass@8": 0.8}
    return [first, *steps, last]


def test_running_means() -> None:
    assert running_mean([1.0, 2.0, 3.0, 6.0], 3) == pytest.approx([2.0, 11 / 3])
    assert running_mean([1.0, 2.0], 3) == [1.5]


def test_an_outcome() -> None:
    entropy = [0.1] * 4 + [0.9] * 5 + [0.2] * 3
    reward = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 9.0, 9.0, 9.0, 9.0, 3.0, 5.0]
    found = outcome(lines(entropy, reward, 0.4, 0.3), late=2)
    assert (found.accuracy_before, found.accuracy, found.format, found.pass_at_k) == (0.4, 0.3, 0.5, 0.8)
    assert (found.reward_start, found.reward_best, found.reward_late) == (3.0, 9.0, 4.0)
    assert (found.entropy_start, found.entropy_highest, found.entropy_late) == pytest.approx((0.1, 0.9, 0.2))
    assert (found.passes_ln2, found.fell, found.gate_shut) == (1.0, 1.0, 0.25)


def test_a_peak_of_one_step_is_no_passing_and_a_small_loss_no_fall() -> None:
    found = outcome(lines([0.1, 0.1, 2.0, 0.1, 0.1, 0.1], [1.0] * 6, 0.4, 0.36))
    assert (found.passes_ln2, found.fell) == (0.0, 0.0)
    assert outcome([{"step": 0, **row} for row in ungated()]).gate_shut == 0.0


def ungated() -> Rows:
    """Of an arm without a gate."""
    rows = lines([0.1], [1.0], 0.4, 0.4)
    return [{name: value for name, value in row.items() if name != "gate/pass_rate"} for row in rows]


def test_a_run_without_evaluations_is_named(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "name": "r",
            "dir": str(tmp_path),
            "model": {"path": "m"},
            "data": {"path": "d"},
            "training": {"steps": 1},
        }
    )
    config.path.mkdir()
    rows = [row for row in lines([0.1], [1.0], 0.4, 0.4) if "eval/accuracy" not in row]
    (config.path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"metrics.jsonl: 1 steps and 0 evaluations"):
        read_outcome(Planned("r", {}, config))
