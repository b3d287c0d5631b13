"""The packing plan: every completion once, within the budget, the same number of micro-batches, balanced."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.packing import (
    PackingPlan,
    padded_lengths,
    plan_micro_batches,
    shared_prompt_saving,
)

BUDGET = 64
completions = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 36)), max_size=80)


def indices(plan: PackingPlan) -> list[int]:
    return sorted(i for rank in plan.micro_batches for batch in rank for i in batch)


@settings(max_examples=150, deadline=None)
@given(completions, st.integers(1, 5), st.sampled_from([1, 4, 8]), st.sampled_from([1, 2, 3]))
def test_a_plan_keeps_every_rule(
    lengths: list[tuple[int, int]], data_parallel: int, alignment: int, multiple: int
) -> None:
    prompts, generated = [p for p, _ in lengths], [c for _, c in lengths]

    def make() -> PackingPlan:
        return plan_micro_batches(
            prompts,
            generated,
            token_budget=BUDGET,
            data_parallel=data_parallel,
            alignment=alignment,
            micro_batches_multiple=multiple,
        )

    plan = make()
    assert plan == make()
    assert indices(plan) == list(range(len(lengths)))
    assert len(plan.micro_batches) == data_parallel
    assert {len(rank) for rank in plan.micro_batches} == {plan.micro_batches_per_rank}
    assert plan.micro_batches_per_rank % multiple == 0
    padded = [-(-(p + c) // alignment) * alignment for p, c in lengths]
    assert padded_lengths(prompts, generated, alignment).tolist() == padded
    for rank, tokens, costs in zip(plan.micro_batches, plan.tokens, plan.costs, strict=True):
        assert list(tokens) == [sum(padded[i] for i in batch) for batch in rank]
        assert max(tokens, default=0) <= BUDGET
        assert list(costs) == sorted(costs, reverse=True)
    empty = sum(not batch for rank in plan.micro_batches for batch in rank)
    assert not empty or len(lengths) < data_parallel * plan.micro_batches_per_rank


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 4))
def test_no_more_micro_batches_than_twice_the_least(lengths: list[int], data_parallel: int) -> None:
    plan = plan_micro_batches([0] * len(lengths), lengths, token_budget=BUDGET, data_parallel=data_parallel)
    least = -(-sum(lengths) // (BUDGET * data_parallel))
    assert plan.micro_batches_per_rank <= 2 * least


def test_ranks_and_micro_batches_are_balanced_by_cost() -> None:
    lengths = [100 + (index * 7919) % 3900 for index in range(512)]
    plan = plan_micro_batches([50] * 512, lengths, token_budget=16384, data_parallel=8)
    assert plan.imbalance < 1.001
    assert plan.fill > 0.85
    for costs in plan.costs:
        assert max(costs) < 1.05 * min(costs)


def test_attention_counts_in_the_balance() -> None:
    # One sequence of 8,192 tokens costs more than eight of 1,024.
    plan = plan_micro_batches(
        [0] * 9, [8192] + [1024] * 8, token_budget=16384, data_parallel=2, hidden_size=256
    )
    assert [0] in [sorted(itertools.chain(*rank)) for rank in plan.micro_batches]
    assert max(plan.costs)[0] == 8192 * (12 * 256 + 8192)


def test_completions_of_a_group_stand_together() -> None:
    plan = plan_micro_batches([4] * 6, [4] * 6, token_budget=48, data_parallel=1, groups=[1, 0, 1, 0, 1, 0])
    assert plan.micro_batches == (((1, 3, 5, 0, 2, 4),),)


def test_fewer_completions_than_ranks_leaves_empty_micro_batches() -> None:
    plan = plan_micro_batches([4, 4], [4, 8], token_budget=48, data_parallel=4)
    assert sorted(plan.micro_batches) == [((),), ((),), ((0,),), ((1,),)]
    assert plan.imbalance == pytest.approx(
        4 * 12 * (12 * 4096 + 12) / (8 * (12 * 4096 + 8) + 12 * (12 * 4096 + 12))
    )


def test_no_micro_batch_is_empty_where_another_rank_can_spare_a_completion() -> None:
    # By cost alone one rank would get the completion of 60 tokens and nothing else, for its two micro-batches.
    lengths = [30, 30, 60, 10, 4, 6, 50, 30]
    plan = plan_micro_batches([0] * 8, lengths, token_budget=64, data_parallel=3, hidden_size=4)
    assert plan.micro_batches_per_rank == 2
    assert all(batch for rank in plan.micro_batches for batch in rank)


def test_without_completions_there_are_no_micro_batches() -> None:
    plan = plan_micro_batches([], [], token_budget=48, data_parallel=2)
    assert plan.micro_batches == ((), ())
    assert (plan.micro_batches_per_rank, plan.imbalance, plan.fill) == (0, 1.0, 1.0)


def test_a_completion_over_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"completion 1 has 72 tokens .*micro_batch_tokens: 64.*at least 72"):
        plan_micro_batches([10, 20, 10], [8, 45, 50], token_budget=64, data_parallel=1, alignment=8)


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompt lengths for 1 completion lengths"):
        plan_micro_batches([1, 2], [1], token_budget=64, data_parallel=1)
    with pytest.raises(ValueError, match="groups has 1 entries for 2 completions"):
        plan_micro_batches([1, 2], [1, 1], token_budget=64, data_parallel=1, groups=[0])


def test_what_sharing_prompts_would_save() -> None:
    prompts, generated, groups = [10, 10, 10, 20], [5, 5, 5, 15], [0, 0, 0, 1]
    assert shared_prompt_saving(prompts, generated, groups) == pytest.approx(20 / 80)
    plan = plan_micro_batches(prompts, generated, token_budget=45, data_parallel=1)
    together = sum(max(0, len([i for i in batch if i < 3]) - 1) for batch in plan.micro_batches[0])
    assert shared_prompt_saving(prompts, generated, groups, plan) == pytest.approx(10 * together / 80)
    assert shared_prompt_saving([], [], []) == 0.0
