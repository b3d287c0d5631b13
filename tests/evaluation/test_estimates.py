"""Figures with their uncertainty: hand-worked cases, and brute force over all subsets."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.estimates import (
    Z,
    check_ks,
    default_ks,
    entropy_estimate,
    estimate,
    estimates,
    rows_of,
)
from gtpo_megatron.evaluation.passk import majority_at_k, votes
from tests.evaluation.test_passk import group, sample


def by_brute_force(right: int, others: tuple[int, ...], k: int) -> float:
    """The mean over all subsets of what a vote is worth, ties shared."""
    answers = ["right"] * right + [str(i) for i, count in enumerate(others) for _ in range(count)]
    worth = []
    for drawn in itertools.combinations(answers, k):
        counts = Counter(drawn)
        leaders = [answer for answer, count in counts.items() if count == max(counts.values())]
        worth.append(("right" in leaders) / len(leaders))
    return sum(worth) / len(worth)


@pytest.mark.parametrize(
    ("right", "others"),
    [
        (4, ()),
        (0, (4,)),
        (2, (2,)),
        (3, (1, 1, 1)),
        (2, (3, 1, 1)),
        (4, (4, 2)),
        (1, (1, 1, 1, 1)),
        (3, (2, 2, 3)),
    ],
)
def test_majority_is_the_mean_over_all_subsets(right: int, others: tuple[int, ...]) -> None:
    for k in range(1, right + sum(others) + 1):
        assert majority_at_k(right, others, k) == pytest.approx(by_brute_force(right, others, k), abs=1e-12)


def test_majority_by_hand() -> None:
    assert majority_at_k(2, (2,), 4) == 0.5  # a tie of two
    assert majority_at_k(1, (1, 1), 3) == pytest.approx(1 / 3)
    assert majority_at_k(2, (1,), 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    with pytest.raises(ValueError, match="no 4 votes"):
        majority_at_k(1, (2,), 4)


def test_majority_of_many_samples_is_quick_and_sound() -> None:
    assert majority_at_k(20, (1,) * 44, 64) == 1.0
    assert 0.9 < majority_at_k(20, (1,) * 44, 32) <= 1.0
    assert majority_at_k(20, (19, 10, 5, 5, 3, 2), 1) == pytest.approx(20 / 64)


def test_votes_count_equal_answers_once() -> None:
    samples = [replace(sample(0, "4", True), text=text) for text in ("it is 4", r"\boxed{4}", "so 4.0")]
    assert votes([*samples, sample(0, None, False), sample(0, "5", False), sample(0, None, False)]) == [
        (True, 3),
        (False, 2),
        (False, 1),
    ]


def test_an_interval_by_hand() -> None:
    found = estimate([0.0, 1.0, 1.0, 0.0], 0, 1)
    stderr = math.sqrt((4 * 0.25) / 3 / 4)
    assert found.value == 0.5 and found.stderr == pytest.approx(stderr)
    assert (found.low, found.high) == (0.0, 1.0)  # 0.5 -+ 0.566 is cut
    wide = estimate([10.0, 14.0])
    assert (wide.value, wide.stderr) == (12.0, 2.0)
    assert (wide.low, wide.high) == pytest.approx((12 - 2 * Z, 12 + 2 * Z))


def test_all_right_or_none_is_no_certainty() -> None:
    right, wrong = estimate([1.0] * 30, 0, 1), estimate([0.0] * 30, 0, 1)
    assert (right.high, wrong.low) == (1.0, 0.0)
    assert right.low == pytest.approx(30 / (30 + Z**2)) and wrong.high == pytest.approx(1 - right.low)
    assert estimate([1.0], 0, 1).as_dict() == {
        "value": 1.0,
        "stderr": None,
        "low": 0,
        "high": 1,
        "prompts": 1,
    }


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = estimate((random.binomial(4, random.beta(2, 3, size=200)) / 4).tolist(), 0, 1)
        held += found.low <= 0.4 <= found.high
    assert 0.93 < held / 1000 < 0.97


@pytest.mark.parametrize(("samples", "ks"), [(1, (1,)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (7, (1, 2, 4, 7))])
def test_default_ks(samples: int, ks: tuple[int, ...]) -> None:
    assert default_ks(samples) == check_ks((), samples) == ks


def test_k_above_the_samples_is_refused() -> None:
    assert check_ks((4, 2, 4), 4) == (2, 4)
    with pytest.raises(UserError, match=r"evaluation\.k: 8 is not from 1 to the number of samples, 4"):
        check_ks((1, 8), 4)


def test_the_rows_and_figures_of_two_prompts() -> None:
    trajectories = group(0, "4445", right="4") + group(1, "5-55", right="4")
    rows = rows_of(trajectories, (1, 4), {}, tokens_known=True, whole_distribution=True)
    assert [(row["id"], row["right"], row["samples"]) for row in rows] == [("0", 3, 4), ("1", 0, 4)]
    found = estimates([row["values"] for row in rows])
    assert {name: round(value.value, 6) for name, value in found.items()} == {
        "pass@1": 0.375,
        "pass@4": 0.5,
        "maj@4": 0.5,
        "format": 0.875,
        "truncated": 0.125,
        "no_answer": 0.125,
        "length": 3.0,
        "entropy": 0.0,
    }


def test_what_is_not_known_is_no_figure() -> None:
    trajectories = [replace(t, index=i) for i, t in enumerate(group(0, "44", right="4"))]
    lengths = {(0, 0): 5}
    rows = rows_of(trajectories, (1,), lengths, tokens_known=False, whole_distribution=True)
    assert not {"length", "entropy"} & set(rows[0]["values"])
    (row,) = rows_of(trajectories, (1,), lengths | {(0, 1): 8}, tokens_known=False, whole_distribution=True)
    assert row["values"]["length"] == 6.5


def test_entropy_is_the_mean_surprise_of_the_tokens() -> None:
    one = replace(sample(0, "4", True), logprobs=np.log(np.array([0.5, 0.25, 1.0], np.float32)))
    assert entropy_estimate([one]) == pytest.approx(math.log(2))
    assert entropy_estimate([replace(one, logprobs=np.empty(0, np.float32))]) is None
