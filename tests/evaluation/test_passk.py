"""pass@k and maj@k, and the figures of an evaluation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from gtpo_megatron.evaluation.passk import any_right, by_group, maj_at_k, pass_at_k
from gtpo_megatron.evaluation.training import figures
from gtpo_megatron.trajectories.record import Trajectory


def sample(group: int, given: str | None, right: bool, length: int = 3) -> Trajectory:
    """A completion that answers `given`, or without an answer."""
    ids = np.zeros(length, np.int32)
    return Trajectory(
        step=0,
        group=group,
        index=0,
        prompt_id=str(group),
        prompt_ids=ids,
        token_ids=ids,
        logprobs=ids.astype(np.float32),
        token_versions=ids,
        finish_reason="stop" if given else "length",
        text=f"<reasoning>so</reasoning><answer>{given}</answer>" if given else "no idea",
        reward_terms={"accuracy": float(right), "format": float(given is not None)},
    )


def group(number: int, answers: str, right: str) -> list[Trajectory]:
    """One sample per character; "-" is none."""
    return [sample(number, None if a == "-" else a, a == right) for a in answers]


@pytest.mark.parametrize(
    ("answers", "passed", "majority"),
    [
        ("4444", 1, 1),
        ("4435", 1, 1),
        ("4555", 1, 0),
        ("5566", 0, 0),
        ("4455", 1, 1),  # a tie goes to the answer that came first
        ("5544", 1, 0),
        ("4---", 1, 0),  # completions without an answer vote, for none
        ("4--4", 1, 1),
        ("----", 0, 0),
    ],
)
def test_one_prompt(answers: str, passed: float, majority: float) -> None:
    samples = group(0, answers, right="4")
    assert any_right(samples) == passed
    assert maj_at_k(samples) == majority


def test_shares_are_of_prompts() -> None:
    samples = group(0, "44", "4") + group(1, "45", "5") + group(2, "11", "2") + group(3, "-7", "7")
    mixed = [samples[place] for place in (3, 0, 7, 4, 1, 5, 2, 6)]
    assert any_right(mixed) == 0.75
    assert maj_at_k(samples) == 0.25
    assert [[t.group for t in members] for members in by_group(mixed)] == [[1, 1], [0, 0], [3, 3], [2, 2]]


def test_equal_answers_count_as_one_whatever_the_reasoning() -> None:
    first, *others = group(0, "544", right="4")
    others[1] = replace(others[1], text=others[1].text.replace("so", "thus").replace("4<", " 4 <"))
    assert maj_at_k([first, *others]) == 1


def test_answers_without_tags_and_other_spellings_are_votes() -> None:
    right = [replace(sample(0, "4", True), text=text) for text in ("it is 4", r"\boxed{4}", "so 4.")]
    assert maj_at_k([*right, replace(sample(0, "5", False), text="it is 5")]) == 1
    wrong = [
        replace(sample(0, "5", False), text=text)
        for text in (r"\boxed{\frac12}", "<answer>0.5</answer>", "0.50")
    ]
    assert maj_at_k([*wrong, *right[:2]]) == 0


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [(4, 1, 1, 0.25), (4, 2, 2, 5 / 6), (4, 2, 3, 1.0), (5, 0, 5, 0.0), (3, 3, 1, 1.0)],
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(
    samples: int, right: int, k: int, expected: float
) -> None:
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(expected)
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_of_nonsense(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(samples, right, k)


def test_figures_of_greedy_completions() -> None:
    samples = [*group(0, "4", "4"), *group(1, "-", "4"), *group(2, "3", "4"), sample(3, "4", True, length=7)]
    assert figures(samples) == {
        "eval/accuracy": 0.5,
        "eval/format": 0.75,
        "eval/length_mean": 4.0,
        "eval/truncated": 0.25,
        "eval/prompts": 4.0,
    }


def test_figures_of_several_samples() -> None:
    found = figures(group(0, "4445", "4") + group(1, "5554", "4"))
    assert found["eval/accuracy"] == 0.5
    assert (found["eval/pass@4"], found["eval/maj@4"], found["eval/prompts"]) == (1.0, 0.5, 2.0)
