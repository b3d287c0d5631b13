"""Reward terms: functions (completion, answer, question) -> float. Imported by the workers, so nothing heavy here.

The paper's reward is `paper_format` + `paper_correctness`, and this is how its authors' implementation computes it,
with the departures that `paper_correctness` names.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

from gtpo_megatron.rewards.answers import (
    MAX_LENGTH,
    answer_text,
    import_verifier,
    number,
    same_answer,
    stated_answer,
)

Term = Callable[[str, str, str], float]

_ANSWER_AT_END = re.compile(r"<answer>(?:(?!</?answer>).)*</answer>\s*\Z", re.DOTALL)
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
    completion: str,
    answer: str,
    question: str = "",
    tolerance: float = 0.01,
    substring: bool = False,
    rule: str = "one_answer",
) -> float:
    """The paper's correctness reward: 10 for the right answer in the full format, else 0.

    Numbers are right within `tolerance`. Departures from the authors' implementation: a currency sign, a percent sign
    and thousands separators are not held against a number; an answer that is no number is compared by math-verify;
    an answer must be one answer (`rule: last_number` accepts the last number in it too, whatever stands around it); and an
    answer that only contains the reference's characters ("180" for "18") is wrong, unless `substring` is set.
    """
    if paper_format(completion) < 10.0:
        return 0.0
    given = answer_text(completion) or ""
    right = _RULES[rule](given, answer, tolerance)
    return 10.0 if right or (substring and answer in given) else 0.0


def format_exact(completion: str, answer: str = "", question: str = "") -> float:
    """1 if the text is one reasoning pair, then one answer pair, and nothing else; 0 otherwise."""
    return float(len(_TAG.findall(completion)) == 4 and _EXACT.fullmatch(completion) is not None)


def math_verify_correct(completion: str, answer: str, question: str = "", rule: str = "one_answer") -> float:
    """1 if the answer is one answer and math-verify finds it equivalent to the reference, else 0.

    The last `<answer>` pair is judged; without one the last `\\boxed{}`, else the last number. `rule: last_number`
    accepts the last number in it as well, whatever stands around it.
    """
    given = stated_answer(completion)
    return float(given is not None and _RULES[rule](given, answer))


def load_term(kind: str, function: str | None, options: dict[str, Any]) -> Term:
    """The function of a configured term, its options bound.

    Raises:
        ImportError, AttributeError, TypeError, ValueError: the path of a user's function does not lead to a function, or
            the function does not take the options.
    """
    term = import_function(function or "") if kind == "python" else _TERMS[kind]
    check_options(kind, term, options)
    if kind in ("math_verify", "paper_correctness"):
        import_verifier()  # now, not within the first completion's time limit
    if kind == "python":
        return lambda completion, answer, question: term(completion, answer, question=question, **options)
    return partial(term, **options)


def import_function(path: str) -> Callable[..., float]:
    """The function at `package.module:function` or `package.module:Class.method`.

    Raises:
        ValueError: the path has another form.
        AttributeError: the module has no such name.
        TypeError: it is no function.
        Exception: whatever importing the user's module raises.
    """
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise ValueError(f"'{path}' is not of the form package.module:function")
    function: Any = importlib.import_module(module_name)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"'{path}' is a {type(function).__name__}, not a function")
    return function


def term_function(kind: str) -> Term:
    """The function of a built-in term."""
    return _TERMS[kind]


def check_options(kind: str, function: Callable[..., float], options: dict[str, Any]) -> None:
    """See that a term can be called with its options: their names, and a built-in term's values.

    Raises:
        TypeError: an unknown or missing option, or one that every call gives already.
        ValueError: a value without meaning.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions written in C may have none
        return
    taken = [name for name in options if name in ("completion", "answer", "question")]
    if taken:
        raise TypeError(f"option '{taken[0]}' is given by every call already")
    try:
        signature.bind("", "", question="", **options)
    except TypeError as error:
        known = [name for name in signature.parameters if name not in ("completion", "answer", "question")]
        raise TypeError(f"{error} (options: {', '.join(known) or 'none'})") from None
    for name, value in options.items() if kind != "python" else ():
        if problem := _option_problem(name, value):
            raise ValueError(f"option '{name}' must be {problem}, not {value!r}")


def _option_problem(name: str, value: Any) -> str | None:
    if name == "rule" and value not in _RULES:
        return f"one of {', '.join(_RULES)}"
    if name == "substring" and not isinstance(value, bool):
        return "true or false"
    if name == "tolerance" and not (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    ):
        return "a number from 0"
    return None


def _last_number(given: str, expected: str, tolerance: float = 5e-7) -> bool:
    """The looser rule: right by the strict one, or by the last number in the answer where the reference is a number."""
    if same_answer(given, expected, tolerance):
        return True
    value, numbers = number(expected), _LAST_NUMBER.findall(given[-MAX_LENGTH:])
    last = number(numbers[-1]) if numbers else None
    return value is not None and last is not None and abs(last - value) <= Fraction(tolerance)


_LAST_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_RULES: dict[str, Callable[..., bool]] = {"one_answer": same_answer, "last_number": _last_number}
_TERMS: dict[str, Term] = {
    "paper_format": paper_format,
    "paper_correctness": paper_correctness,
    "math_verify": math_verify_correct,
    "format": format_exact,
}
