"""Figures of an evaluation with their uncertainty: pure functions of the samples. The unit is the prompt, not the sample:
the completions of one prompt are no independent draws of the set."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.passk import by_group, majority_at_k, pass_at_k, votes
from gtpo_megatron.rewards.answers import stated_answer
from gtpo_megatron.trajectories.record import Trajectory

Z = 1.959963984540054  # of a normal distribution's central 95%

Lengths = Mapping[
    tuple[int, int], int
]  # (group, index) -> tokens, of completions whose token ids are not known


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, its standard error, and its 95% interval."""

    value: float
    stderr: float | None  # None of a single prompt
    low: float
    high: float
    prompts: int

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-able."""
        return asdict(self)


def estimate(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
    """The mean of one value per prompt, with its interval over prompts.

    The interval is the normal one, cut at the bounds that a value cannot pass. Where all prompts have the same value at
    a bound (all right, none right) a normal interval would claim certainty: it is Wilson's then.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if not count:
        raise ValueError("a mean of no prompts")
    mean = fmean(values)
    if count == 1:
        return Estimate(mean, None, lowest, highest, 1)
    stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    low, high = max(mean - Z * stderr, lowest), min(mean + Z * stderr, highest)
    reach = (highest - lowest) * Z**2 / (count + Z**2)
    if stderr == 0 and math.isfinite(reach):
        low = highest - reach if mean == highest else low
        high = lowest + reach if mean == lowest else high
    return Estimate(mean, stderr, low, high, count)


def default_ks(samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `samples`, which is always among them."""
    return tuple(sorted({*(2**i for i in range(samples.bit_length())), samples}))


def check_ks(ks: Sequence[int], samples: int) -> tuple[int, ...]:
    """The k asked for, in order, or the default ones.

    Raises:
        UserError: a k that so many samples cannot give.
    """
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(
                f"evaluation.k: {k} is not from 1 to the number of samples, {samples}: pass@k is estimated from at "
                "least k completions of each prompt; raise evaluation.samples, or drop it"
            )
    return tuple(sorted(set(ks))) or default_ks(samples)


def prompt_values(
    group: Sequence[Trajectory], ks: Sequence[int], lengths: Lengths, tokens_known: bool
) -> dict[str, float]:
    """The figures of one prompt: pass@k and maj@k, and shares and means over its samples.

    Raises:
        ValueError: a k above the number of samples.
    """
    samples = len(group)
    found = votes(group)
    right = sum(count for is_right, count in found if is_right)
    others = tuple(sorted(count for is_right, count in found if not is_right))
    values = {f"pass@{k}": pass_at_k(samples, right, k) for k in ks}
    values |= {f"maj@{k}": majority_at_k(right, others, k) for k in ks if k > 1}
    values["format"] = fmean(t.reward_terms["format"] for t in group)
    values["truncated"] = fmean(float(t.finish_reason == "length") for t in group)
    values["no_answer"] = fmean(float(stated_answer(t.text) is None) for t in group)
    known = [t.length if tokens_known else lengths.get((t.group, t.index)) for t in group]
    if None not in known:
        values["length"] = fmean(known)
    return values


def entropy_estimate(group: Sequence[Trajectory]) -> float | None:
    """Mean over tokens of -log p (nats) of what was sampled: an unbiased estimate of the mean token entropy where the whole
    distribution is sampled from (top_p 1, temperature above 0). None without tokens."""
    tokens = sum(len(t.logprobs) for t in group)
    return -sum(float(t.logprobs.sum(dtype="float64")) for t in group) / tokens if tokens else None


def estimates(rows: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Each figure over the prompts that have it; one that a prompt lacks is left out, for its mean would be of others."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: estimate([row[name] for row in rows], *bounds(name)) for name in names}


def bounds(name: str) -> tuple[float, float]:
    """What a figure's mean can be."""
    return (0.0, math.inf) if name in ("length", "entropy") else (0.0, 1.0)


def rows_of(
    trajectories: Sequence[Trajectory],
    ks: Sequence[int],
    lengths: Lengths,
    *,
    tokens_known: bool,
    whole_distribution: bool,
    note: Callable[[Sequence[Trajectory]], dict[str, str]] = lambda group: {"id": group[0].prompt_id},
) -> list[dict[str, object]]:
    """One row per prompt, in order: `note` of it, right samples, samples, and `values` (`prompt_values`, entropy)."""
    rows: list[dict[str, object]] = []
    for group in sorted(by_group(trajectories), key=lambda members: members[0].group):
        values = prompt_values(group, ks, lengths, tokens_known)
        entropy = entropy_estimate(group) if tokens_known and whole_distribution else None
        if entropy is not None:
            values["entropy"] = entropy
        right = sum(t.reward_terms["accuracy"] > 0 for t in group)
        rows.append({**note(group), "right": right, "samples": len(group), "values": values})
    return rows
