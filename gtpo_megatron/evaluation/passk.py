"""Figures over several samples of one prompt."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from gtpo_megatron.rewards.terms import answer_text
from gtpo_megatron.trajectories.record import Trajectory


def by_group(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The completions of each prompt."""
    groups = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group].append(trajectory)
    return list(groups.values())


def pass_at_k(trajectories: Sequence[Trajectory]) -> float:
    """Share of prompts with at least one right completion among their k."""
    groups = by_group(trajectories)
    return sum(any(t.reward_terms["accuracy"] > 0 for t in group) for group in groups) / len(groups)


def maj_at_k(trajectories: Sequence[Trajectory]) -> float:
    """Share of prompts whose most frequent answer is right; ties go to the answer that came first."""
    groups = by_group(trajectories)
    right = 0
    for group in groups:
        answers = [answer_text(t.text) for t in group]
        winner = Counter(answers).most_common(1)[0][0]
        right += group[answers.index(winner)].reward_terms["accuracy"] > 0
    return right / len(groups)
