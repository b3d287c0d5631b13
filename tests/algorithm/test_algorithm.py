"""Single facts of the specification, and what the public functions refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_megatron import algorithm


def test_std_advantages_use_the_sample_deviation_of_each_group() -> None:
    rewards = torch.tensor([1.0, 5.0, 2.0, 7.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([9, -1, 9, -1, 4])
    result = algorithm.group_advantages(rewards, groups, "std", eps=1e-4)
    first, second = math.sqrt(0.5) + 1e-4, math.sqrt(2.0) + 1e-4
    assert result.tolist() == pytest.approx(
        [-0.5 / first, -1 / second, 0.5 / first, 1 / second, 0.0], abs=1e-12
    )


def test_equal_rewards_give_no_advantage_even_where_their_sum_rounds() -> None:
    rewards = torch.full((1000,), 0.1, dtype=torch.float64)
    assert not algorithm.group_advantages(rewards, torch.zeros(1000, dtype=torch.int64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewards", [[0.1, 0.2, 0.3], [0.7, 0.8, 0.9], [1.1, 1.2, 1.3, 1.2]])
def test_a_reward_equal_to_the_mean_but_for_rounding_stands_on_no_side(
    rewards: list[float], dtype: torch.dtype
) -> None:
    result = algorithm.group_advantages(torch.tensor(rewards, dtype=dtype), torch.zeros(len(rewards)).long())
    assert result.sign().tolist() == [-1, 0, 1, 0][: len(rewards)]


def test_std_advantages_of_larger_groups_divide_by_n_minus_one() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0, 3.5, 7.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    result = algorithm.group_advantages(rewards, groups, "std")
    expected = [(r - g.mean()) / (g.std(correction=1) + 1e-4) for g in rewards.split([4, 3]) for r in g]
    assert result.tolist() == pytest.approx([float(value) for value in expected], rel=1e-12)


def test_small_rewards_are_no_rounding() -> None:
    result = algorithm.group_advantages(torch.tensor([1e-9, 3e-9], dtype=torch.float64), torch.tensor([0, 0]))
    assert result.tolist() == pytest.approx([-1e-9, 1e-9], rel=1e-6)


def test_what_counts_as_rounding_is_five_units_of_the_largest_reward() -> None:
    unit = torch.finfo(torch.float64).eps
    for units, sign in ((8, 0), (10, 0), (12, 1), (20, 1)):  # an advantage is half of the difference
        rewards = torch.tensor([1.0 - units * unit, 1.0], dtype=torch.float64)
        assert algorithm.group_advantages(rewards, torch.tensor([0, 0])).sign().tolist() == [-sign, sign]


def test_a_completion_without_advantage_keeps_weight_one_whatever_its_runs() -> None:
    one = torch.tensor([1])
    weights = algorithm.token_weights(one, one, torch.tensor([3]), torch.zeros(1), 3)
    assert weights.tolist() == [[1.0, 1.0, 1.0]]


def test_integer_rewards_give_floats() -> None:
    result = algorithm.group_advantages(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(result, torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


def test_different_positions_may_be_matched_by_completions_whose_own_run_has_ended() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 9, 9, 9], [8, 2, 8, 8], [7, 7, 3, 0]])
    lengths, groups = torch.tensor([4, 4, 4, 3]), torch.zeros(4, dtype=torch.int64)
    prefix, suffix = algorithm.conflict_runs(ids, lengths, torch.tensor([1.0, -1.0, -1.0, -1.0]), groups)
    assert prefix.tolist() == [3, 1, 0, 0]
    assert suffix.tolist() == [0, 0, 0, 0]


class Watched(Tensor):
    """Counts the elements that are copied from it or from a view of it."""

    read = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if not isinstance(result, Tensor) or function is Tensor.as_strided:
            return result
        cls.read += result.numel()
        return result.as_subclass(Tensor)


def test_conflict_runs_reads_no_position_beyond_the_first_block_after_the_runs() -> None:
    ids = torch.arange(4 * 100_000).view(4, 100_000)
    ids[:, :20] = 5
    Watched.read = 0
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    lengths, groups = torch.full((4,), 100_000), torch.zeros(4, dtype=torch.int64)
    prefix, suffix = algorithm.conflict_runs(ids.as_subclass(Watched), lengths, signs, groups)
    assert prefix.tolist() == [20] * 4
    assert suffix.tolist() == [0] * 4
    assert 0 < Watched.read < 4 * 2 * 100


def test_conflict_runs_reads_on_only_in_groups_whose_runs_go_on() -> None:
    ids = torch.arange(20 * 1000).view(20, 1000)
    ids[:2] = 5  # identical: runs of the whole length; the other nine groups differ from the first token on
    Watched.read = 0
    signs, groups = torch.tensor([1.0, -1.0]).repeat(10), torch.arange(10).repeat_interleave(2)
    lengths = torch.full((20,), 1000)
    prefix, suffix = algorithm.conflict_runs(ids.as_subclass(Watched), lengths, signs, groups)
    assert prefix.tolist() == suffix.tolist() == [1000] * 2 + [0] * 18
    longest, shortest = 2 * 2 * 1000, 2 * 18 * 8  # both directions; blocks may be read beyond the end
    assert longest < Watched.read < 2 * longest + 2 * shortest


def test_conflict_runs_of_transposed_and_sliced_ids() -> None:
    ids = torch.randint(2, (6, 40), generator=torch.Generator().manual_seed(0))
    lengths, groups = torch.full((6,), 20), torch.tensor([0, 0, 0, 1, 1, 1])
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    expected = algorithm.conflict_runs(ids[:, 10:30].contiguous(), lengths, signs, groups)
    assert expected[0].any() and expected[1].any()
    for view in (ids[:, 10:30], ids.T.contiguous().T[:, 10:30], ids.repeat_interleave(2, 1)[:, 20:60:2]):
        assert not view.is_contiguous()
        result = algorithm.conflict_runs(view, lengths, signs, groups)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_large_group_of_one_sided_advantages_has_no_runs() -> None:
    ids, groups = torch.zeros(6, 4, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    prefix, suffix = algorithm.conflict_runs(ids, torch.full((6,), 4), torch.ones(6), groups)
    assert prefix.dtype == suffix.dtype == torch.int64
    assert not prefix.any() and not suffix.any()


def test_groups_of_one_sign_beside_contested_ones_have_no_runs() -> None:
    # the same tokens everywhere: only the opposite sign within a group makes a run
    ids = torch.tensor([[5, 6, 7]] * 9)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
    advantages = torch.tensor([1.0, 2.0, -1.0, 1.0, 0.0, -1.0, -2.0, 1.0, -1.0])
    prefix, suffix = algorithm.conflict_runs(ids, torch.full((9,), 3), advantages, groups)
    assert prefix.tolist() == suffix.tolist() == [0, 0, 3, 3, 0, 0, 0, 3, 3]


def test_completions_of_one_token() -> None:
    ids = torch.tensor([[4], [4], [4], [9], [9]])
    advantages, groups = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 0, 0, 1])
    prefix, suffix = algorithm.conflict_runs(ids, torch.ones(5, dtype=torch.int64), advantages, groups)
    assert prefix.tolist() == suffix.tolist() == [1, 1, 1, 0, 0]
    # in a wider batch, what stands beyond the one token is never looked at
    wide = torch.tensor([[4, 8, 8], [4, 7, 7], [4, 8, 8], [9, 8, 8], [4, 8, 8]])
    again = algorithm.conflict_runs(wide, torch.ones(5, dtype=torch.int64), advantages, groups)
    assert [runs.tolist() for runs in again] == [prefix.tolist(), suffix.tolist()]


def test_gate_modes() -> None:
    entropy = torch.tensor([0.2, 0.9, 0.9, 0.7], dtype=torch.float64)
    signs = torch.tensor([-1.0, -1.0, 1.0, 0.0])

    def gate(initial: float, mode: str) -> list[float]:
        return algorithm.entropy_gate(entropy, initial, 0.7, mode, signs).tolist()

    assert gate(0.71, "paper") == gate(0.71, "only_negative") == gate(0.5, "off") == [1, 1, 1, 1]
    assert gate(0.7, "paper") == gate(0.71, "always") == [1, 0, 0, 1]
    assert gate(0.7, "only_negative") == [1, 0, 1, 1]
    no_side = algorithm.entropy_gate(entropy, 0.7, 0.7, "only_negative", torch.zeros(4))
    assert no_side.tolist() == [1, 1, 1, 1]  # without advantage is not negative


def test_the_threshold_is_ln_2_by_default() -> None:
    around = torch.tensor([0.693, 0.694], dtype=torch.float64)
    assert algorithm.entropy_gate(around, 0.693).tolist() == [1, 0]
    assert algorithm.entropy_gate(around, 0.694).tolist() == [1, 1]


def test_a_broken_entropy_shows_in_the_loss() -> None:
    entropy = torch.tensor([0.2, float("nan")])
    gate = algorithm.entropy_gate(entropy, 0.1)
    ones = torch.ones(2, 3)
    loss = algorithm.gtpo_loss(-ones, entropy, ones, torch.ones(2), torch.tensor([3, 3]), gate, 0.0, 2)
    assert loss.isnan()


def test_entropy_carries_no_gradient() -> None:
    entropy = torch.tensor([0.2, 0.3], requires_grad=True)
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    ones, lengths = torch.ones(2, 3), torch.tensor([3, 3])
    gate = algorithm.entropy_gate(entropy, 0.1)
    algorithm.gtpo_loss(logprobs, entropy, ones, torch.ones(2), lengths, gate, 0.1, 2).backward()
    assert entropy.grad is None
    assert logprobs.grad is not None


def test_normalizers() -> None:
    groups = torch.tensor([7, 3, 7, 7])
    assert algorithm.completion_normalizers(groups).tolist() == [6, 2, 6, 6]
    runs = torch.tensor([0, 1, 4, 2]), torch.tensor([0, 3, 1, 2])
    assert algorithm.completion_normalizers(groups, *runs, "reference").tolist() == [2, 6, 8, 4]


def test_everything_accepts_empty_input() -> None:
    none, ints, rows = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5)
    assert algorithm.group_advantages(none, ints, "std").shape == (0,)
    prefix, suffix = algorithm.conflict_runs(rows.long(), ints, none, ints)
    assert prefix.shape == suffix.shape == (0,)
    assert algorithm.token_weights(prefix, suffix, ints, none, 5).shape == (0, 5)
    assert algorithm.entropy_gate(none, 0.1).shape == (0,)
    assert algorithm.completion_normalizers(ints).shape == (0,)
    logprobs = rows.clone().requires_grad_()
    loss = algorithm.gtpo_loss(logprobs, none, rows, none, ints, none, 0.1, 8)
    loss.backward()
    assert loss.item() == 0
    assert algorithm.grpo_loss(logprobs, rows, none, ints, 8)[0].item() == 0
    assert algorithm.sft_loss(logprobs, rows, 8).item() == 0
    assert algorithm.importance_weights(rows, rows, ints, level="token", cap=2.0).weights.shape == (0, 5)


IDS = torch.zeros(2, 3, dtype=torch.int64)
TWO = torch.tensor([3, 2])
SIGNS = torch.tensor([1.0, -1.0])
ONES = torch.ones(2, 3)

GOOD: dict[str, dict[str, Any]] = {
    "group_advantages": {"rewards": SIGNS, "group_ids": TWO},
    "conflict_runs": {"token_ids": IDS, "lengths": TWO, "advantages": SIGNS, "group_ids": TWO},
    "token_weights": {"prefix": TWO, "suffix": TWO, "lengths": TWO, "advantages": SIGNS, "max_length": 3},
    "entropy_gate": {"mean_entropy": SIGNS, "initial_entropy": 0.1, "advantages": SIGNS},
    "completion_normalizers": {"group_ids": TWO, "prefix": TWO, "suffix": TWO, "compat": "reference"},
    "gtpo_loss": {
        "logprobs": ONES,
        "mean_entropy": SIGNS,
        "weights": ONES,
        "advantages": SIGNS,
        "lengths": TWO,
        "gate": SIGNS,
        "gamma": 0.1,
        "num_completions": 2,
    },
    "grpo_loss": {
        "logprobs": ONES,
        "weights": ONES,
        "advantages": SIGNS,
        "lengths": TWO,
        "num_completions": 2,
        "beta": 0.1,
        "ref_logprobs": ONES,
    },
    "sft_loss": {"logprobs": ONES, "weights": ONES, "num_tokens": 5},
    "importance_weights": {
        "trainer_logprobs": ONES,
        "sampler_logprobs": ONES,
        "lengths": TWO,
        "level": "token",
        "cap": 2.0,
    },
}
NAN = float("nan")
BAD: list[tuple[str, str, Any, str]] = [
    ("group_advantages", "rewards", torch.tensor([1.0, NAN]), r"rewards\[1\] is nan"),
    ("group_advantages", "rewards", torch.tensor([float("inf"), 0.0]), r"rewards\[0\] is inf"),
    ("group_advantages", "rewards", ONES, r"rewards must have shape \[N\], not \[2, 3\]"),
    (
        "group_advantages",
        "group_ids",
        torch.zeros(3, dtype=torch.int64),
        r"group_ids must have shape \[N\] = \[2\]",
    ),
    ("group_advantages", "group_ids", SIGNS, "group_ids must hold integers, not torch.float32"),
    ("group_advantages", "normalize", "max", 'normalize is \'max\': it must be "mean" or "std"'),
    ("conflict_runs", "token_ids", IDS[0], r"token_ids must have shape \[N, L\], not \[3\]"),
    ("conflict_runs", "token_ids", ONES, "token_ids must hold integers"),
    (
        "conflict_runs",
        "lengths",
        torch.tensor([3, 0]),
        r"lengths\[1\] is 0: a length must be from 1 to L = 3",
    ),
    ("conflict_runs", "lengths", torch.tensor([4, 1]), r"lengths\[0\] is 4"),
    ("conflict_runs", "lengths", torch.tensor([1]), r"lengths must have shape \[N\] = \[2\], not \[1\]"),
    ("conflict_runs", "lengths", torch.tensor([1.0, 2.0]), "lengths must hold integers"),
    ("conflict_runs", "advantages", torch.tensor([NAN, 1.0]), r"advantages\[0\] is nan"),
    ("conflict_runs", "advantages", torch.ones(3), "advantages must have shape"),
    ("conflict_runs", "group_ids", torch.zeros(3, dtype=torch.int64), "group_ids must have shape"),
    ("conflict_runs", "group_ids", SIGNS, "group_ids must hold integers"),
    ("token_weights", "max_length", 2, r"lengths\[0\] is 3: a length must be from 1 to L = 2"),
    ("token_weights", "lengths", IDS, r"lengths must have shape \[N\], not \[2, 3\]"),
    ("token_weights", "prefix", torch.tensor([3, 3]), r"prefix\[1\] is 3: a run is from 0"),
    ("token_weights", "suffix", torch.tensor([-1, 0]), r"suffix\[0\] is -1"),
    ("token_weights", "suffix", torch.tensor([0]), "suffix must have shape"),
    ("token_weights", "prefix", SIGNS, "prefix must hold integers"),
    ("token_weights", "advantages", torch.tensor([1.0, NAN]), r"advantages\[1\] is nan"),
    ("token_weights", "advantages", torch.ones(1), "advantages must have shape"),
    ("token_weights", "compat", "authors", "compat is 'authors'"),
    ("entropy_gate", "mean_entropy", ONES, r"mean_entropy must have shape \[N\]"),
    ("entropy_gate", "mean_entropy", TWO, "mean_entropy must hold floating-point numbers"),
    ("entropy_gate", "initial_entropy", NAN, "initial_entropy is NaN"),
    ("entropy_gate", "advantages", torch.ones(1), "advantages must have shape"),
    ("entropy_gate", "mode", "on", "mode is 'on'"),
    ("completion_normalizers", "group_ids", IDS, r"group_ids must have shape \[N\]"),
    ("completion_normalizers", "group_ids", SIGNS, "group_ids must hold integers"),
    ("completion_normalizers", "prefix", None, "prefix and suffix are missing"),
    ("completion_normalizers", "suffix", torch.tensor([0]), "suffix must have shape"),
    ("completion_normalizers", "suffix", SIGNS, "suffix must hold integers"),
    ("completion_normalizers", "compat", "authors", "compat is 'authors'"),
    ("gtpo_loss", "logprobs", SIGNS, r"logprobs must have shape \[N, L\]"),
    ("gtpo_loss", "logprobs", IDS, "logprobs must hold floating-point numbers"),
    ("gtpo_loss", "weights", torch.ones(2, 2), r"weights must have shape \[N, L\] = \[2, 3\], not \[2, 2\]"),
    ("gtpo_loss", "old_logprobs", torch.ones(3, 2), "old_logprobs must have shape"),
    ("gtpo_loss", "mean_entropy", torch.ones(1), "mean_entropy must have shape"),
    ("gtpo_loss", "advantages", torch.ones(1), "advantages must have shape"),
    ("gtpo_loss", "gate", ONES, "gate must have shape"),
    ("gtpo_loss", "lengths", torch.tensor([2, 5]), r"lengths\[1\] is 5"),
    ("gtpo_loss", "num_completions", 0, "num_completions is 0"),
    ("gtpo_loss", "num_completions", torch.tensor([1, 0]), r"num_completions\[1\] is 0"),
    ("gtpo_loss", "num_completions", torch.tensor([1]), "num_completions must have shape"),
    ("grpo_loss", "ref_logprobs", None, "ref_logprobs are missing: beta is 0.1"),
    ("grpo_loss", "ref_logprobs", torch.ones(1, 3), "ref_logprobs must have shape"),
    ("grpo_loss", "lengths", torch.tensor([0, 1]), r"lengths\[0\] is 0"),
    ("sft_loss", "logprobs", SIGNS, "logprobs must have shape"),
    ("sft_loss", "logprobs", IDS, "logprobs must hold floating-point numbers"),
    ("sft_loss", "weights", SIGNS, "weights must have shape"),
    ("sft_loss", "num_tokens", 0, "num_tokens is 0"),
    ("importance_weights", "level", "group", "level is 'group'"),
    ("importance_weights", "cap", 0.0, "cap is 0.0"),
    ("importance_weights", "trainer_logprobs", SIGNS, "trainer_logprobs must have shape"),
    ("importance_weights", "trainer_logprobs", IDS, "trainer_logprobs must hold floating-point numbers"),
    ("importance_weights", "sampler_logprobs", ONES[:1], "sampler_logprobs must have shape"),
    (
        "importance_weights",
        "sampler_logprobs",
        torch.tensor([[0, 0, NAN], [0, NAN, 0]]),
        r"sampler_logprobs\[0\]",
    ),
    ("importance_weights", "lengths", torch.tensor([4, 1]), r"lengths\[0\] is 4"),
]


@pytest.mark.parametrize("name", GOOD)
def test_the_good_arguments_are_accepted(name: str) -> None:
    getattr(algorithm, name)(**GOOD[name])


@pytest.mark.parametrize(("name", "argument", "value", "message"), BAD)
def test_a_bad_argument_is_named(name: str, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(algorithm, name)(**{**GOOD[name], argument: value})


def test_only_negative_needs_advantages() -> None:
    with pytest.raises(ValueError, match="advantages are missing"):
        algorithm.entropy_gate(torch.ones(2), 0.1, 0.5, "only_negative")


def test_the_weight_of_negative_completions_in_conflict_is_an_option() -> None:
    """0 is GTPO's; with 1 for both signs nothing is in conflict any more."""
    runs, lengths = torch.tensor([2, 2]), torch.tensor([3, 3])
    arguments = (runs, torch.zeros_like(runs), lengths, torch.tensor([1.0, -1.0]), 4)
    assert algorithm.token_weights(*arguments).tolist() == [[2, 2, 1, 0], [0, 0, 1, 0]]
    assert algorithm.token_weights(*arguments, negative_weight=0.5).tolist() == [
        [2, 2, 1, 0],
        [0.5, 0.5, 1, 0],
    ]
    none = algorithm.token_weights(*arguments, 1.0, negative_weight=1.0)
    assert none.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
