"""The packing plan: which completions each data-parallel rank trains on together, under a token budget per micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError

HIDDEN_SIZE = 4096  # a typical model, for the cost estimate alone


@dataclass(frozen=True)
class PackingPlan:
    """Completions by rank and micro-batch. Every rank has the same number of micro-batches; some may be empty.

    The outer tuples are the data-parallel ranks, the next ones their micro-batches in order of execution, largest first.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]  # indices of completions
    tokens: tuple[tuple[int, ...], ...]  # padded tokens of each micro-batch, prompts included
    costs: tuple[tuple[int, ...], ...]  # estimated cost of each micro-batch, see `sequence_cost`
    token_budget: int

    @property
    def micro_batches_per_rank(self) -> int:
        """Number of micro-batches of every rank."""
        return len(self.micro_batches[0])

    @property
    def imbalance(self) -> float:
        """Cost of the costliest rank over the mean of the ranks; 1 is perfect, and what a step waits for."""
        ranks = [sum(costs) for costs in self.costs]
        return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0

    @property
    def fill(self) -> float:
        """Share of the token budget that is used, over all micro-batches; 1 without micro-batches."""
        counts = [count for rank in self.tokens for count in rank]
        return sum(counts) / (len(counts) * self.token_budget) if counts else 1.0


def sequence_cost(tokens: NDArray[np.int64], hidden_size: int = HIDDEN_SIZE) -> NDArray[np.int64]:
    """Estimated cost of training on sequences of so many tokens, in 1 / (12 hidden_size) of a token's linear cost.

    A transformer layer takes about 24 h^2 operations for a token's matrix products, and 2 h s for its causal attention
    in a sequence of s: s + s^2 / (12 h). Whole numbers, so that the plan is the same on every machine.
    """
    return tokens * (12 * hidden_size + tokens)


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    token_budget: int,
    data_parallel: int,
    alignment: int = 1,
    groups: Sequence[int] | None = None,
    micro_batches_multiple: int = 1,
    hidden_size: int = HIDDEN_SIZE,
) -> PackingPlan:
    """Spread completions over ranks and micro-batches: equal numbers of micro-batches, each within the budget, equal costs.

    Sequences go, costliest first, to the cheapest rank, and there to the cheapest micro-batch that has room. The number of
    micro-batches a rank is the smallest multiple of `micro_batches_multiple`, from what best-fit packing needs, for which
    this succeeds. A micro-batch is empty only when there are fewer completions than micro-batches. The plan depends on
    nothing but the arguments.

    Args:
        prompt_lengths: tokens of each completion's prompt.
        completion_lengths: generated tokens of each completion.
        token_budget: tokens that a micro-batch may hold, padding and prompts included.
        data_parallel: number of data-parallel ranks.
        alignment: each sequence is padded to a multiple of it (context and sequence parallelism need that).
        groups: group of each completion; orders the completions of a micro-batch so that those of a group stand together.
        micro_batches_multiple: the interleaved pipeline schedule needs a multiple of the pipeline size.
        hidden_size: of the model, for the cost estimate.

    Returns:
        The plan; without completions, one of no micro-batches.

    Raises:
        UserError: a sequence longer than the budget.
        ValueError: sequences of different lengths.
    """
    lengths = padded_lengths(prompt_lengths, completion_lengths, alignment)
    if groups is not None and len(groups) != len(lengths):
        raise ValueError(f"groups has {len(groups)} entries for {len(lengths)} completions")
    if len(lengths) and lengths.max() > token_budget:
        index = int(lengths.argmax())
        raise UserError(
            f"completion {index} has {lengths[index]} tokens ({prompt_lengths[index]} of its prompt, "
            f"{completion_lengths[index]} generated, padded to a multiple of {alignment}), more than the budget of a "
            f"micro-batch, training.micro_batch_tokens: {token_budget}. Raise it to at least {lengths[index]}, or lower "
            "data.max_prompt_tokens or rollout.max_new_tokens."
        )

    costs = sequence_cost(lengths, hidden_size)
    order = np.lexsort((np.arange(len(lengths)), -costs))
    least = _best_fit_count(lengths[order], token_budget)
    count = -(-least // (data_parallel * micro_batches_multiple)) * micro_batches_multiple
    while (ranks := _plan_ranks(order, lengths, costs, token_budget, data_parallel, count)) is None:
        count += micro_batches_multiple
    keys = np.zeros(len(lengths), dtype=np.int64) if groups is None else np.asarray(groups)

    def in_order(batch: list[int]) -> tuple[int, ...]:
        return tuple(sorted(batch, key=lambda index: (keys[index], index)))

    return PackingPlan(
        micro_batches=tuple(tuple(in_order(batch) for batch in rank) for rank in ranks),
        tokens=tuple(tuple(int(lengths[batch].sum()) for batch in rank) for rank in ranks),
        costs=tuple(tuple(int(costs[batch].sum()) for batch in rank) for rank in ranks),
        token_budget=token_budget,
    )


def padded_lengths(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[int], alignment: int = 1
) -> NDArray[np.int64]:
    """Tokens of each prompt and completion together, padded to a multiple of `alignment`: [N].

    Raises:
        ValueError: the arguments differ in length.
    """
    if len(prompt_lengths) != len(completion_lengths):
        raise ValueError(
            f"{len(prompt_lengths)} prompt lengths for {len(completion_lengths)} completion lengths"
        )
    total = np.asarray(prompt_lengths, dtype=np.int64) + np.asarray(completion_lengths, dtype=np.int64)
    return -(-total // alignment) * alignment


def shared_prompt_saving(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    groups: Sequence[int],
    plan: PackingPlan | None = None,
) -> float:
    """Share of all tokens that need not be computed if completions of a group share their prompt's tokens.

    With a plan, sharing is within a micro-batch, where a packed attention kernel could do it; without one, it is over the
    whole step: the upper bound. Padding is left out.

    Args:
        prompt_lengths: tokens of each completion's prompt.
        completion_lengths: generated tokens of each completion.
        groups: group of each completion; its completions have one prompt.
        plan: a plan for these completions.

    Returns:
        From 0 to below 1; 0 without completions.
    """
    whole = tuple(range(len(prompt_lengths)))
    batches = [whole] if plan is None else [batch for rank in plan.micro_batches for batch in rank]
    needed = sum(sum({groups[i]: prompt_lengths[i] for i in batch}.values()) for batch in batches)
    total = sum(prompt_lengths) + sum(completion_lengths)
    return (sum(prompt_lengths) - needed) / total if total else 0.0


def _best_fit_count(lengths: NDArray[np.int64], token_budget: int) -> int:
    """Micro-batches that best-fit packing needs, for lengths in the order of packing."""
    room = np.full(len(lengths), token_budget)
    used = 0
    for length in lengths:
        fits = np.where(room[: used + 1] >= length, room[: used + 1], token_budget + 1)
        batch = int(fits.argmin())
        room[batch] -= length
        used = max(used, batch + 1)
    return used


def _plan_ranks(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    costs: NDArray[np.int64],
    token_budget: int,
    data_parallel: int,
    count: int,
) -> list[list[list[int]]] | None:
    """Completions of each rank and each of its `count` micro-batches, costliest first; None if they do not fit so."""
    least = min(count, len(order) // data_parallel)
    ranks = _spread(order, lengths, costs, count * token_budget, data_parallel, least)
    if ranks is None:
        return None
    plan = []
    for rank in ranks:
        batches = _spread(np.array(rank, dtype=np.int64), lengths, costs, token_budget, count, least=0)
        if batches is None:
            return None
        plan.append(sorted(batches, key=lambda batch: -int(costs[batch].sum())))
    return plan


def _spread(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    costs: NDArray[np.int64],
    capacity: int,
    count: int,
    least: int,
) -> list[list[int]] | None:
    """Each completion, in `order`, to the cheapest of `count` bins with room for it; None if one finds no room.

    Every bin gets at least `least` completions: the last ones go only to bins that still lack some. (An empty bin is the
    cheapest, so that none stays empty where there are completions enough.)
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    room = np.full(count, capacity)
    cost = np.zeros(count, dtype=np.int64)
    lacking = np.full(count, least)
    for done, index in enumerate(order):
        allowed = room >= lengths[index]
        if len(order) - done == lacking.sum():
            allowed &= lacking > 0
        if not allowed.any():
            return None
        chosen = int(np.where(allowed, cost, np.iinfo(np.int64).max).argmin())
        bins[chosen].append(int(index))
        room[chosen] -= lengths[index]
        cost[chosen] += costs[index]
        lacking[chosen] = max(0, lacking[chosen] - 1)
    return bins
