"""Figures over several samples of one prompt."""

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from gtpo_megatron.rewards.answers import same_answer, stated_answer
from gtpo_megatron.trajectories.record import Trajectory


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n of which c were: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code".

    Raises:
        ValueError: not 0 <= right <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"right must be from 0 to samples = {samples}, not {right}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to samples = {samples}, not {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def by_group(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The completions of each prompt."""
    groups = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group].append(trajectory)
    return list(groups.values())


def any_right(trajectories: Sequence[Trajectory]) -> float:
    """Share of prompts with at least one right completion among their samples: pass@k where k is all of them."""
    groups = by_group(trajectories)
    return sum(any(map(_is_right, group)) for group in groups) / len(groups)


def maj_at_k(trajectories: Sequence[Trajectory]) -> float:
    """Share of prompts whose most frequent answer (see `votes`) is right; ties go to the answer that came first."""
    groups = by_group(trajectories)
    return sum(_majority_is_right(group) for group in groups) / len(groups)


def _majority_is_right(group: Sequence[Trajectory]) -> bool:
    return max(votes(group), key=lambda vote: vote[1])[0]


def votes(group: Sequence[Trajectory]) -> list[tuple[bool, int]]:
    """(whether it is right, votes) of each different answer of a group, in the order of their first.

    Answers are one where the verifier finds them equal; right ones equal the reference. Completions without an answer
    are together one answer, a wrong one.
    """
    found: list[tuple[str | None, bool, int]] = []
    for trajectory in group:
        answer, right = stated_answer(trajectory.text), _is_right(trajectory)
        for place, (other, other_right, count) in enumerate(found):
            if right == other_right and (right or _same(answer, other)):
                found[place] = (other, other_right, count + 1)
                break
        else:
            found.append((answer, right, 1))
    return [(right, count) for _, right, count in found]


@lru_cache(maxsize=100_000)
def majority_at_k(right: int, others: tuple[int, ...], k: int) -> float:
    """Chance that the most frequent answer of k samples, drawn without return from those given, is the right one.

    Ties are averaged: where the right answer shares the lead with t others it counts 1 / (t + 1). Exact, over all
    C(n, k) draws at once, where n = right + sum(others); so it is without bias, as pass@k is.

    Args:
        right: samples with the right answer.
        others: samples of each wrong answer, at least 1 each.
        k: how many vote.

    Raises:
        ValueError: not 1 <= k <= n, or a negative count.
    """
    samples = right + sum(others)
    if right < 0 or min(others, default=1) < 1 or not 1 <= k <= samples:
        raise ValueError(f"no {k} votes of {right} right samples and {others} others")
    favourable = Fraction(0)
    for lead in range(1, min(right, k) + 1):
        shared = sum(Fraction(ways, ties + 1) for ties, ways in _others_drawn(others, lead, k - lead).items())
        favourable += math.comb(right, lead) * shared
    return float(favourable / math.comb(samples, k))


def _others_drawn(others: tuple[int, ...], lead: int, drawn: int) -> dict[int, int]:
    """Ways to draw so many from the wrong answers, none more often than `lead`, by how many of them reach it."""
    singles = sum(count == 1 for count in others) if lead > 1 else 0  # these never tie with a lead above 1
    several = [count for count in others if not (singles and count == 1)]
    ways = {(i, 0): math.comb(singles, i) for i in range(min(singles, drawn) + 1)}
    for count in several:
        more: dict[tuple[int, int], int] = defaultdict(int)
        for (taken, ties), number in ways.items():
            for i in range(min(count, lead, drawn - taken) + 1):
                more[taken + i, ties + (i == lead)] += number * math.comb(count, i)
        ways = more
    result: dict[int, int] = defaultdict(int)
    for (taken, ties), number in ways.items():
        if taken == drawn:
            result[ties] += number
    return result


def _same(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.strip() == other.strip() or same_answer(one, other)


def _is_right(trajectory: Trajectory) -> bool:
    return trajectory.reward_terms["accuracy"] > 0
