"""Figures over several samples of one prompt."""

import math
from collections import defaultdict
from collections.abc import Sequence

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
    """Share of prompts whose most frequent answer is right; ties go to the answer that came first.

    Answers are one vote where the verifier finds them equal. Completions without an answer vote for none.
    """
    groups = by_group(trajectories)
    return sum(_majority_is_right(group) for group in groups) / len(groups)


def _majority_is_right(group: Sequence[Trajectory]) -> bool:
    votes: list[tuple[str | None, bool, list[Trajectory]]] = []  # an answer, whether it is right, who gave it
    for trajectory in group:
        answer, right = stated_answer(trajectory.text), _is_right(trajectory)
        for other, other_right, voters in votes:
            if right == other_right and (right or _same(answer, other)):  # right ones equal the reference
                voters.append(trajectory)
                break
        else:
            votes.append((answer, right, [trajectory]))
    return max(votes, key=lambda vote: len(vote[2]))[1]


def _same(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.strip() == other.strip() or same_answer(one, other)


def _is_right(trajectory: Trajectory) -> bool:
    return trajectory.reward_terms["accuracy"] > 0
