"""Reward terms, one text at a time."""

import pytest

from gtpo_megatron.rewards.terms import (
    answer_text,
    format_exact,
    math_verify_correct,
    paper_correctness,
    paper_format,
)


def full(answer: str) -> str:
    return f"<reasoning>\nwork\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (full("4"), 10.0),
        (full("4") + "\n", 10.0),
        ("Well. " + full("4"), 10.0),  # the authors' implementation allows words before
        (full("4") + " Done.", 1.5),  # but none after
        ("<reasoning>work</reasoning> 4", 1.0),
        ("<reasoning>work</reasoning> <answer>4", 1.5),
        ("<reasoning>work</reasoning> 4</answer>", 1.5),
        ("<answer>4</answer>", 1.0),
        ("<reasoning>work <answer>4</answer>", 1.5),
        ("</reasoning> <answer>4</answer>", 1.5),
        ("<reasoning>work <answer>4", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_paper_format(text: str, reward: float) -> None:
    assert paper_format(text) == reward


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("18", "18", True),
        ("18.004", "18", True),
        ("18.02", "18", False),
        ("$1,250", "1250", True),
        ("50%", "50", True),
        ("180", "18", False),
        ("17", "18", False),
        ("", "18", False),
        (r"\frac{1}{2}", r"\frac12", True),
        ("Evelyn", "Evelyn", True),
        ("x^2+1", "1+x^2", True),
    ],
)
def test_paper_correctness_is_10_or_0(given: str, answer: str, right: bool) -> None:
    assert paper_correctness(full(given), answer) == (10.0 if right else 0.0)


def test_there_is_no_correctness_without_format() -> None:
    assert paper_correctness("<answer>18</answer>", "18") == 0.0
    assert paper_correctness(full("18") + " and more", "18") == 0.0


def test_the_substring_rule_of_the_authors_is_an_option() -> None:
    assert paper_correctness(full("180"), "18", substring=True) == 10.0


def test_the_last_answer_counts() -> None:
    text = "<reasoning>r</reasoning><answer>17</answer> no, <answer>18</answer>"
    assert answer_text(text) == "18"
    assert paper_correctness(text, "18") == 10.0
    assert paper_correctness(text, "17") == 0.0


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (full("4"), 1.0),
        (f"\n{full('4')}\n", 1.0),
        ("Well. " + full("4"), 0.0),
        (full("4") + ".", 0.0),
        ("<answer>4</answer><reasoning>r</reasoning>", 0.0),
        ("<reasoning>r</reasoning> so <answer>4</answer>", 0.0),
        ("<reasoning>r<answer>3</answer></reasoning><answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_exact(text: str, exact: float) -> None:
    assert format_exact(text) == exact


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (full("18 dollars"), "18", 1.0),
        (full("0.5"), r"\frac{1}{2}", 1.0),
        (full(r"\boxed{\frac{2}{4}}"), r"\frac{1}{2}", 1.0),
        (full("19"), "18", 0.0),
        ("17 is wrong. <answer>18</answer> 17", "18", 1.0),
        (r"so \boxed{18}, not 17", "18", 1.0),
        ("first 17, and in the end 18", "18", 1.0),
        ("no number", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_math_verify(text: str, answer: str, reward: float) -> None:
    assert math_verify_correct(text, answer) == reward
