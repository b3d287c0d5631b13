"""Effects over seeds: intervals against published tables, and how often they hold the truth."""

import math

import numpy as np
import pytest

from gtpo_megatron.sweep.effects import (
    bootstrap_interval,
    mean_interval,
    paired_effect,
    share_interval,
    student_quantile,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # from the usual tables of Student's t
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 7, 2.365),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
        (0.9, 5, 1.476),
        (0.995, 10, 3.169),
        (0.5, 6, 0.0),
    ],
)
def test_quantiles_of_student(probability: float, freedom: int, expected: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)


def test_student_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(3.0, 2.0, size=(4000, 5))
    held = [interval.low <= 3.0 <= interval.high for interval in map(mean_interval, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_interval() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.2, 0.6]
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert min(values) < interval.low < interval.mean < interval.high < max(values)
    # its width is that of the normal interval with the deviation of the sample itself
    expected = 2 * 1.96 * np.std(values) / math.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)
    assert bootstrap_interval([2.0, 2.0]).low == 2.0


def test_share_interval_is_wilsons() -> None:
    none, half = share_interval(0, 8), share_interval(5, 10)
    assert (none.mean, none.low, none.high) == pytest.approx((0.0, 0.0, 0.3244), abs=1e-4)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_effects_are_paired_by_seed() -> None:
    """The seeds' own spread, which both arms share, is no part of the uncertainty."""
    other = {1: 0.0, 2: 10.0, 3: -7.0, 4: 99.0}
    arm = {3: -6.0, 1: 1.5, 2: 11.1, 9: 0.0}
    effect = paired_effect(arm, other)
    assert effect.difference.seeds == 3
    assert effect.difference.mean == pytest.approx(1.2)
    assert effect.difference.excludes_zero and effect.bootstrap.excludes_zero
    assert effect.standardised == pytest.approx(1.2 / np.std([1.0, 1.5, 1.1], ddof=1))
    assert paired_effect({1: 1.0}, {2: 1.0}) is None


def test_one_seed_claims_nothing() -> None:
    effect = paired_effect({1: 2.0}, {1: 1.0})
    assert (effect.difference.mean, effect.difference.low, effect.standardised) == (1.0, None, None)
    assert not effect.difference.excludes_zero
    with pytest.raises(ValueError, match="no seeds"):
        mean_interval([])
    with pytest.raises(ValueError, match="9 of 8"):
        share_interval(9, 8)
