"""Figures of a step, against values worked out by hand."""

import numpy as np
import pytest

from gtpo_megatron.trajectories.analysis import repetition, summarise
from tests.trajectories.test_store import trajectory


def test_metrics_of_a_step() -> None:
    step = [
        trajectory(
            10,
            group=0,
            reward=2.0,
            advantage=1.0,
            prefix=2,
            suffix=1,
            reward_terms={"format": 1.0, "right": 1.0},
        ),
        trajectory(
            6,
            group=0,
            reward=0.0,
            advantage=-1.0,
            prefix=4,
            suffix=5,
            reward_terms={"format": 0.0, "right": 0.0},
        ),
        trajectory(
            4, group=1, reward=1.0, reward_terms={"format": 1.0, "right": 0.0}, finish_reason="length"
        ),
        trajectory(
            20,
            group=1,
            reward=1.0,
            reward_terms={"format": 1.0, "right": 0.0},
            reward_error="x",
            token_versions=np.repeat(np.int32([4, 5]), 10),
        ),
    ]
    assert summarise(step) == pytest.approx(
        {
            "reward/mean": 1.0,
            "reward/std": 0.5**0.5,
            "reward/format": 0.75,
            "reward/right": 0.25,
            "reward/failed": 0.25,
            "advantage/abs_mean": 0.5,
            "advantage/max": 1.0,
            "advantage/min": -1.0,
            "response/length_mean": 10.0,
            "response/length_max": 20.0,
            "response/truncated": 0.25,
            "response/repetition": 0.0,
            "response/continued": 0.25,
            "conflict/prefix_mean": 1.5,
            "conflict/suffix_mean": 1.5,
            "conflict/protected_share": 6 / 40,  # the runs of 4 and 5 overlap in 6 tokens
            "conflict/amplified_share": 3 / 40,
            "groups/no_signal": 0.5,
        }
    )


def test_one_completion_of_no_tokens_has_finite_metrics() -> None:
    metrics = summarise([trajectory(0)])
    assert metrics["conflict/protected_share"] == 0.0 and metrics["groups/no_signal"] == 1.0


def test_no_completions_is_an_error() -> None:
    with pytest.raises(ValueError, match="without completions"):
        summarise([])


def test_conflict_shares_add_up_over_completions_and_leave_out_those_without_advantage() -> None:
    metrics = summarise(
        [
            trajectory(10, advantage=1.0, prefix=2),
            trajectory(10, advantage=3.0, suffix=3),
            trajectory(10, advantage=-2.0, prefix=1),
            trajectory(10, advantage=-2.0, prefix=3),
            trajectory(10, advantage=0.0, prefix=4),
        ]
    )
    assert metrics["conflict/amplified_share"] == pytest.approx(5 / 50)
    assert metrics["conflict/protected_share"] == pytest.approx(4 / 50)


def test_a_term_that_a_completion_lacks_counts_as_zero() -> None:
    metrics = summarise(
        [trajectory(3, reward_terms={"format": 1.0}), trajectory(3, reward_error="no verdict")]
    )
    assert metrics["reward/format"] == 0.5


@pytest.mark.parametrize(
    ("completions", "share"),
    [
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),  # the last of five runs stood before
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # in another completion
        ([[1, 2, 3]], 0.0),
        ([[1, 2], [1, 2]], 0.0),  # no run in either, and more than one over both
        ([[5] * 6, [1, 2, 3, 4]], 2 / 4),
    ],
)
def test_repetition_is_of_runs_within_a_completion(completions: list[list[int]], share: float) -> None:
    offsets = np.cumsum([0, *map(len, completions)])
    assert repetition(np.concatenate(completions).astype(np.int32), offsets) == pytest.approx(share)
