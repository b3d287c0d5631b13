"""A step's trajectories in figures."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.trajectories.record import Trajectory

GRAM = 4
_PRIMES = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Metrics of one step, all completions weighing the same.

    Lengths are in tokens. `conflict/protected_share` and `conflict/amplified_share` are shares of all generated tokens:
    those in conflict in completions of negative advantage (weight 0) and of positive advantage (weight w).
    `response/repetition` is the share of runs of 4 tokens that stood earlier in the same completion.
    `groups/no_signal` is the share of groups whose rewards are all equal, `response/continued` that of completions
    sampled with weights of more than one version.

    Raises:
        ValueError: there are none.
    """
    if not trajectories:
        raise ValueError("trajectories: a step without completions has no metrics")
    rewards = np.array([t.reward for t in trajectories])
    advantages = np.array([t.advantage for t in trajectories])
    lengths = np.array([t.length for t in trajectories])
    in_conflict = np.minimum(lengths, [t.prefix + t.suffix for t in trajectories])  # the runs may overlap
    tokens = max(int(lengths.sum()), 1)

    metrics = {"reward/mean": rewards.mean(), "reward/std": rewards.std()}
    for term in sorted({term for t in trajectories for term in t.reward_terms}):
        metrics[f"reward/{term}"] = np.mean([t.reward_terms.get(term, 0.0) for t in trajectories])
    metrics |= {
        "reward/failed": np.mean([t.reward_error is not None for t in trajectories]),
        "advantage/abs_mean": np.abs(advantages).mean(),
        "advantage/max": advantages.max(),
        "advantage/min": advantages.min(),
        "response/length_mean": lengths.mean(),
        "response/length_max": lengths.max(),
        "response/truncated": np.mean([t.finish_reason == "length" for t in trajectories]),
        "response/repetition": _repetition(trajectories),
        "response/continued": np.mean([len(np.unique(t.token_versions)) > 1 for t in trajectories]),
        "conflict/prefix_mean": np.mean([t.prefix for t in trajectories]),
        "conflict/suffix_mean": np.mean([t.suffix for t in trajectories]),
        "conflict/protected_share": in_conflict[advantages < 0].sum() / tokens,
        "conflict/amplified_share": in_conflict[advantages > 0].sum() / tokens,
        "groups/no_signal": _no_signal(trajectories, rewards),
    }
    return {name: float(value) for name, value in metrics.items()}


def _repetition(trajectories: Sequence[Trajectory]) -> float:
    offsets = np.cumsum([0, *(t.length for t in trajectories)])
    return repetition(np.concatenate([t.token_ids for t in trajectories]), offsets)


def _no_signal(trajectories: Sequence[Trajectory], rewards: NDArray[np.float64]) -> float:
    groups: dict[tuple[int, int], list[float]] = {}
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        groups.setdefault((trajectory.step, trajectory.group), []).append(float(reward))
    return float(np.mean([min(group) == max(group) for group in groups.values()]))


def repetition(token_ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> float:
    """Share of runs of 4 tokens that stood earlier in the same completion; 0 where none is so long.

    Runs are compared by 64-bit hashes, so that a figure may be off by about one in 10^7 of a million runs.
    """
    if len(token_ids) < GRAM:
        return 0.0
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    count = len(token_ids) - GRAM + 1
    hashes = row[:count].astype(np.uint64)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    for k, prime in enumerate(_PRIMES):
        hashes = (hashes ^ (token_ids[k : k + count].astype(np.uint64) + np.uint64(k + 1))) * prime
        hashes ^= hashes >> np.uint64(29)
    hashes = hashes[row[:count] == row[GRAM - 1 :]]
    hashes.sort()
    return float(np.count_nonzero(hashes[1:] == hashes[:-1]) / max(len(hashes), 1))
