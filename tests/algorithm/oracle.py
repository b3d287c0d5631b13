"""The algorithm once more, from the specification's text, with lists and loops."""

import math
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st


@dataclass(frozen=True)
class Batch:
    """Completions of any number of groups, their order mixed."""

    completions: list[list[int]]
    groups: list[int]
    rewards: list[float]


@st.composite
def batches(draw: st.DrawFn, max_groups: int = 4, max_group: int = 6, max_length: int = 24) -> Batch:
    """Groups of different sizes with copied, shifted and shortened completions, tied rewards and interleaved ids."""
    vocabulary = draw(st.sampled_from([1, 2, 3, 50]))
    token = st.integers(0, vocabulary - 1).map(lambda t: t * draw_scale)
    draw_scale = draw(st.sampled_from([1, 7, 2**40]))
    reward = st.sampled_from(
        draw(st.sampled_from([[1.0], [0.0, 1.0], [0.1, 0.2, 0.3], [-2.5, 0.0, 3.75, 21.0]]))
    )
    rows: list[tuple[list[int], int, float]] = []
    ids = draw(st.lists(st.integers(-5, 2**40), min_size=1, max_size=max_groups, unique=True))
    for group in ids:
        base = draw(st.lists(token, min_size=1, max_size=max_length))
        for _ in range(draw(st.integers(1, max_group))):
            kind = draw(st.sampled_from(["copy", "head", "tail", "edit", "fresh"]))
            cut = draw(st.integers(0, len(base) - 1))
            other = draw(st.lists(token, min_size=1, max_size=max_length // 2))
            made = {
                "copy": base,
                "head": base[: cut + 1] + other,
                "tail": other + base[cut:],
                "edit": [*base[:cut], other[0], *base[cut + 1 :]],
                "fresh": other,
            }[kind]
            rows.append((made, group, draw(reward)))
    rows = draw(st.permutations(rows))
    return Batch([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def advantages(batch: Batch) -> list[float]:
    """Exact arithmetic on the decimal values, so that ties with the mean are ties."""
    exact = [Fraction(str(reward)) for reward in batch.rewards]
    means = {}
    for group in set(batch.groups):
        own = [r for r, g in zip(exact, batch.groups, strict=True) if g == group]
        means[group] = sum(own) / len(own)
    return [float(r - means[g]) for r, g in zip(exact, batch.groups, strict=True)]


def run(batch: Batch, signs: list[float], i: int) -> int:
    """The unbroken run from the start of completion i."""
    rivals = [
        other
        for other, group, sign in zip(batch.completions, batch.groups, signs, strict=True)
        if group == batch.groups[i] and sign * signs[i] < 0
    ]
    length = 0
    for t, token in enumerate(batch.completions[i]):
        if not any(len(rival) > t and rival[t] == token for rival in rivals):
            break
        length += 1
    return length


def runs(batch: Batch, signs: list[float]) -> tuple[list[int], list[int]]:
    """Prefix and suffix runs; the suffix is the prefix of the reversed completions."""
    mirrored = Batch([row[::-1] for row in batch.completions], batch.groups, batch.rewards)
    everyone = range(len(batch.completions))
    return [run(batch, signs, i) for i in everyone], [run(mirrored, signs, i) for i in everyone]


def weight(t: int, length: int, prefix: int, suffix: int, advantage: float, w: float, compat: str) -> float:
    """Weight of token t."""
    masks = [t < prefix, length - 1 - t < suffix]
    if not any(masks) or advantage == 0:
        return 1.0
    if advantage < 0:
        return 0.0
    return w * w if compat == "reference" and all(masks) else w


def loss(
    batch: Batch,
    advantage: list[float],
    weights: list[list[float]],
    logprobs: list[list[float]],
    old: list[list[float]],
    entropy: list[float],
    gate: list[float],
    gamma: float,
) -> float:
    """-J of section 5, as a mean over groups of a mean over completions of a mean over tokens."""
    of_group: dict[int, list[float]] = {}
    for i, group in enumerate(batch.groups):
        terms = zip(weights[i], logprobs[i], old[i], strict=True)
        mean = sum(w * math.exp(new - before) for w, new, before in terms) / len(weights[i])
        of_group.setdefault(group, []).append(gate[i] * (advantage[i] - gamma * entropy[i]) * mean)
    return -sum(sum(values) / len(values) for values in of_group.values()) / len(of_group)
