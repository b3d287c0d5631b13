"""Effects over seeds, with intervals. Pure functions of numbers: a seed is the unit, whatever was sampled within a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 20_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and where it may lie. Both ends are None where there is a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Effect:
    """One arm less another, seed by seed."""

    difference: Interval
    bootstrap: Interval  # the same difference, its interval by resampling seeds: no normality assumed, too narrow with few
    standardised: (
        float | None
    )  # mean difference over the differences' deviation; None where that is 0 or unknown


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's 95% interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no seeds")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    reach = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and the 95% percentile interval of the means of resampled values; the same for the same `seed`.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no seeds")
    if len(values) == 1:
        return Interval(values[0], None, None, 1)
    draws = np.random.default_rng(seed).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(fmean(values), float(low), float(high), len(values))


def share_interval(hits: int, count: int) -> Interval:
    """Share of seeds and Wilson's 95% interval, which says something of none and of all as well.

    Raises:
        ValueError: not 0 <= hits <= count, or no seeds.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"{hits} of {count} seeds")
    z, share = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2), hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach), count)


def paired_effect(arm: Mapping[int, float], other: Mapping[int, float]) -> Effect | None:
    """`arm` less `other` over the seeds that both have (seed -> outcome); None where they share none."""
    differences = [arm[seed] - other[seed] for seed in sorted(arm.keys() & other.keys())]
    if not differences:
        return None
    spread = stdev(differences) if len(differences) > 1 else 0.0
    return Effect(
        mean_interval(differences),
        bootstrap_interval(differences),
        fmean(differences) / spread if spread else None,
    )


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t, for a probability from 0.5 up and whole degrees of freedom; error below 1e-9.

    By bisection of the distribution's closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: a probability outside [0.5, 1), or fewer than 1 degree of freedom.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile {probability} of Student's t with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return 0.5 + within / 2
