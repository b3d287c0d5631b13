"""Reward terms: functions (completion, answer, question) -> float. Imported by the workers, so nothing heavy here.

The paper's reward is `paper_format` + `paper_correctness`, and this is how its authors' implementation computes it,
with the three departures that `paper_correctness` names.
"""

import importlib
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

Term = Callable[[str, str, str], float]

_ANSWER_AT_END = re.compile(r"<answer>(?:(?!</?answer>).)*</answer>\s*\Z", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_EXACT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:reasoning|answer)>")


def paper_format(completion: str, answer: str = "", question: str = "") -> float:
    """The paper's format reward.

    10 for a reasoning pair with an answer pair at the end of the text. With only one of the pairs: 1.5 if a stray tag
    of the other stands somewhere, else 1. Without either: 0.
    """
    reasoning = "</reasoning>" in completion.partition("<reasoning>")[2]
    answer_at_end = _ANSWER_AT_END.search(completion) is not None
    if reasoning and answer_at_end:
        return 10.0
    if reasoning:
        return 1.5 if "<answer>" in completion or "</answer>" in completion else 1.0
    if answer_at_end:
        return 1.5 if "<reasoning>" in completion or "</reasoning>" in completion else 1.0
    return 0.0


def paper_correctness(
    completion: str, answer: str, question: str = "", tolerance: float = 0.01, substring: bool = False
) -> float:
    """The paper's correctness reward: 10 for the right answer in the full format, else 0.

    Numbers are right within `tolerance`. Departures from the authors' implementation: a currency sign, a percent sign
    and thousands separators are not held against a number; an answer that is no number is compared by math-verify;
    and an answer that only contains the reference's characters ("180" for "18") is wrong, unless `substring` is set.
    """
    if paper_format(completion) < 10.0:
        return 0.0
    given = answer_text(completion) or ""
    expected_number, given_number = _number(answer), _number(given)
    if expected_number is not None and given_number is not None:
        right = abs(expected_number - given_number) <= tolerance
    else:
        right = _equivalent(given, answer)
    return 10.0 if right or (substring and answer in given) else 0.0


def format_exact(completion: str, answer: str = "", question: str = "") -> float:
    """1 if the text is one reasoning pair, then one answer pair, and nothing else; 0 otherwise."""
    return float(len(_TAG.findall(completion)) == 4 and _EXACT.fullmatch(completion) is not None)


def math_verify_correct(completion: str, answer: str, question: str = "") -> float:
    """1 if math-verify finds the answer equivalent to the reference, else 0.

    The last `<answer>` pair is judged. Without one the whole text is, and math-verify takes its `\\boxed{}`, else the
    last expression or number in it.
    """
    given = answer_text(completion)
    return float(_equivalent(completion if given is None else given, answer))


def answer_text(completion: str) -> str | None:
    """Content of the last complete `<answer>` pair, stripped; None if there is none."""
    matches = _ANSWER.findall(completion)
    return matches[-1].strip() if matches else None


def load_term(kind: str, function: str | None, options: dict[str, Any]) -> Term:
    """The function of a configured term, its options bound.

    Raises:
        ImportError, AttributeError, TypeError, ValueError: the path of a user's function does not lead to a function.
    """
    if kind == "python":
        return partial(_import_function(function or ""), **options)
    if kind in ("math_verify", "paper_correctness"):
        _math_verify()  # slow to import: now, not within the first completion's time limit
    return partial(_TERMS[kind], **options)


_TERMS: dict[str, Term] = {
    "paper_format": paper_format,
    "paper_correctness": paper_correctness,
    "math_verify": math_verify_correct,
    "format": format_exact,
}


def _import_function(path: str) -> Callable[..., float]:
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise ValueError(f"'{path}' is not of the form package.module:function")
    function = importlib.import_module(module_name)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"'{path}' is a {type(function).__name__}, not a function")
    return lambda completion, answer, question, **options: function(
        completion, answer, question=question, **options
    )


def _number(text: str) -> float | None:
    try:
        return float(text.strip().strip("$%").replace(",", ""))
    except ValueError:
        return None


def _equivalent(given: str, expected: str) -> bool:
    if given.strip() == expected.strip():
        return True
    math_verify = _math_verify()
    # No limits of its own: they need SIGALRM, and the pool bounds the whole completion.
    parse = partial(math_verify.parse, parsing_timeout=None)
    verify = partial(math_verify.verify, timeout_seconds=None)
    gold = parse(f"${expected}$")
    readings = (
        [given] if "$" in given or r"\boxed" in given else [given, f"${given}$"]
    )  # bare LaTeX has no anchor
    return any(verify(gold, parse(reading)) for reading in readings)


def _math_verify() -> Any:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call without a limit
    return math_verify
