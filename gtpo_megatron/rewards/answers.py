r"""One answer, unambiguous, or none: what an answer says, what comparing it may cost, and whether two say the same.

An answer that names several values ("17 or 18"), denies one ("not 18") or says another than its last number ("18!",
"0x12") earns nothing: a policy under reinforcement learning finds whatever a looser reading would forgive. Numbers are
compared here; all else goes to math-verify, whole, once its cost is bounded.
"""

import logging
import re
from collections import Counter
from fractions import Fraction
from functools import partial
from typing import Any

MAX_LENGTH = 400  # characters; the longest answer of MATH-500 has 53
_MAX_NESTING = 10
_MAX_DIGITS = 40
_MAX_NUMBERS = 60
_MAX_POWER = 1000  # of a number
_MAX_POWER_OF_SUM = 30  # and of letters: sympy may expand it
_MAX_FACTORIAL = 100

_NUMBER = re.compile(
    r"([-+]?)\s*[$€£]?\s*([-+]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?\s*%?"
)
_IN_TEXT = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad\b|~|\s+")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"\s*(?:\\(?:text|mbox|mathrm)\s*\{(?P<text>[^{}]*)\}|(?<=[\s0-9}])(?P<words>[A-Za-z][A-Za-z]+(?:[ /][A-Za-z]+){0,4}))"
    r"(?:\s*\^\s*\{?[23]\}?)?\s*$"
)
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*$")
_SAYS_ANSWER = re.compile(r"(?:the )?(?:final |correct )?answer(?: is)?\s*[:=]?\s*", re.IGNORECASE)
_NAMED = re.compile(r"([A-Za-z](?:\([A-Za-z]\))?)\s*(?:=|\\in\b)\s*")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_POWER = re.compile(r"\^\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\([^()]*\)|-?[0-9]+|\\?[A-Za-z]+)")
_EXPENSIVE = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|limits)(?![A-Za-z])")

# Words after a number that make it another number, or no single one.
_NO_UNITS = frozenset(
    """
    or and not no nor to but minus plus times over half thirds quarter quarters hundred thousand million
    billion trillion dozen score squared cubed factorial mod modulo if then maybe perhaps either neither
    except instead than
    """.split()  # noqa: SIM905
)
_FUNCTIONS = frozenset(
    """
    frac dfrac tfrac cfrac sqrt pi infty cdot times div left right pm cup cap begin end pmatrix bmatrix
    matrix sin cos tan cot sec csc arcsin arccos arctan log ln exp circ theta alpha beta in to binom
    text mathrm
    """.split()  # noqa: SIM905
)
_VALUES = _FUNCTIONS - {"pm", "cup", "cap", "in", "to", "theta", "alpha", "beta", "infty", "begin", "end"}
_COUNTED = re.compile(r"\\neq?(?![A-Za-z])|\\pm|\\cup|\\not|[≠±∓_:;!?|#@&<>=≤≥]|\bor\b|\band\b|\bnot\b")


def stated_answer(completion: str) -> str | None:
    r"""What a completion gives as its answer: the last `<answer>` pair, else the last \boxed{}, else the last number."""
    given = answer_text(completion)
    if given is not None:
        return given
    tail = completion[-4 * MAX_LENGTH :]
    boxed = _last_group(tail)
    if boxed is not None:
        return boxed
    numbers = list(_IN_TEXT.finditer(tail))
    if not numbers or re.search(r"(?:\bnot|\bor|!=|≠|\\neq?)\s*$", tail[: numbers[-1].start()]):
        return None
    return numbers[-1].group()


_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def answer_text(completion: str) -> str | None:
    """Content of the last complete `<answer>` pair, stripped; None if there is none."""
    matches = _ANSWER.findall(completion)
    return matches[-1].strip() if matches else None


def same_answer(given: str, expected: str, tolerance: float = 5e-7) -> bool:
    """True if `given` states one answer, and it is the expected one.

    Args:
        given: the answer alone, as a completion states it.
        expected: the reference answer.
        tolerance: by which two plain numbers may differ.
    """
    if given.strip() == expected.strip():
        return bool(given.strip())
    if len(given) > MAX_LENGTH or len(expected) > MAX_LENGTH:
        return False
    given, expected = _tidy(given), _tidy(expected)
    if not given or not expected:
        return False
    if _squeezed(given) == _squeezed(expected):
        return True
    given, expected = _without_unit(given), _without_unit(expected)
    given_number, expected_number = number(given), number(expected)
    if given_number is not None and expected_number is not None:
        return abs(given_number - expected_number) <= Fraction(tolerance)
    if _is_word(expected):
        return _word(given) == _word(expected)
    given, expected = _without_name(given, expected)
    if too_expensive(given) or too_expensive(expected) or not _as_single_as(given, expected):
        return False
    return _verified(given, expected)


def number(text: str) -> Fraction | None:
    """The value of a text that is one plain number: 18, -1,250.50, $18, 50%, 1e3; None for any other."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or len(text) > MAX_LENGTH or (match[1] and match[2]):
        return None
    return Fraction(f"{match[1]}{match[2]}{match[3].replace(',', '').rstrip('.')}{match[4] or ''}")


def too_expensive(text: str) -> str | None:
    """Why math-verify could take seconds with a text, or None: length, nesting, digits, powers, factorials, sums."""
    if len(text) > MAX_LENGTH:
        return f"{len(text)} characters"
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        return f"{deepest} levels of brackets"
    digits = [len(run) for run in re.findall("[0-9]+", text)]
    if max(digits, default=0) > _MAX_DIGITS or len(digits) > _MAX_NUMBERS:
        return "too many digits"
    if _EXPENSIVE.search(text):
        return "a sum, product, integral or limit"
    if re.search(r"[)}!]\s*!", text) or any(
        int(n) > _MAX_FACTORIAL for n in re.findall(r"([0-9]+)\s*!", text)
    ):
        return "a large factorial"
    if r"\binom" in text and any(int(n) > 1000 for n in re.findall("[0-9]+", text)):
        return "a large binomial"
    return _expensive_power(text.replace("**", "^"))


def _expensive_power(text: str) -> str | None:
    if text.count("^") > 40:
        return "too many powers"
    letters = re.search("[A-Za-z]", _COMMAND.sub("", text)) is not None
    nested = 1  # polynomials add their powers in a product, but (((x+1)^9)^9)^9 multiplies them
    for match in _POWER.finditer(text):
        exponent, after = match[1], text[match.end() :].lstrip()
        numbers = [int(n) for n in re.findall("[0-9]+", exponent)]
        above = [int(n) for n in re.findall(r"\^\s*\{?([0-9]+)", after)] if after.startswith("^") else []
        tower = above or "^" in exponent or "!" in exponent or after.startswith(("^", "!"))
        if tower and max([*numbers, *above], default=0) > 3:
            return "a tower of powers"
        power, of_sum = max(numbers, default=1), re.search(r"[)}\]]\s*$", text[: match.start()]) is not None
        nested *= max(power, 1) if of_sum else 1
        if power > (_MAX_POWER_OF_SUM if letters or of_sum else _MAX_POWER) or nested > _MAX_POWER_OF_SUM:
            return "a large power"
    return None


def _tidy(text: str) -> str:
    r"""Wrappers and spellings that change no value are gone: $...$, \(...\), \boxed{}, \left, \dfrac, `{,}`, `\$`."""
    text = text.strip().rstrip(".").strip().replace("−", "-").replace(r"\$", "€").replace(r"\%", "%")
    for _ in range(4):
        before = text
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(start) : -len(end)]
            if (
                len(text) > len(start + end)
                and text.startswith(start)
                and text.endswith(end)
                and "$" not in inner
            ):
                text = inner.strip()
        boxed = _last_group(text) if re.match(r"\\f?boxed\{", text) else None
        if boxed is not None and len(boxed) + text.index("{") + 2 == len(text):  # nothing but the box
            text = boxed.strip()
        text = text.rstrip(".").strip()
        if match := _TEXT.fullmatch(text):
            text = match[1].strip()
        if match := _SAYS_ANSWER.match(text):
            text = text[match.end() :]
        if text == before:
            break
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ",", text).replace(r"\!", "")
    return _SPACES.sub(" ", text.replace("**", "^")).strip().replace("€", "$")


def _squeezed(text: str) -> str:
    if re.search(r"[(\[]", text):  # no number's comma then: (2, 12) is (2,12), but 10, 080 may be two numbers
        text = re.sub(r",\s+", ",", text)
    return re.sub(r"\s+(?![0-9A-Za-z])|(?<![0-9A-Za-z,])\s+", "", text)


def _without_unit(text: str) -> str:
    """Without the words that follow a value, unless they change it ("18 million"); without degrees."""
    text = _DEGREES.sub("", text)
    match = _UNIT.search(text)
    if match is None or match.start() == 0:
        return text
    words = re.findall(r"[A-Za-z]+", match["text"] or match["words"] or "")
    strange = re.search(r"[^A-Za-z./ ]", match["text"] or "") is not None
    if strange or any(word.lower() in _NO_UNITS or word.lower() in _FUNCTIONS for word in words):
        return text
    return text[: match.start()].strip()


def _without_name(given: str, expected: str) -> tuple[str, str]:
    r"""Both without `x =` or `x \in`, where one has it alone or both have the same."""
    ours, theirs = _NAMED.match(given), _NAMED.match(expected)
    if ours and theirs and ours[1] != theirs[1]:
        return given, expected
    return (given[ours.end() :] if ours else given), (expected[theirs.end() :] if theirs else expected)


def _is_word(text: str) -> bool:
    return re.fullmatch(r"\(?[A-Za-z]\)?|[A-Za-z]{2,}(?:[ -][A-Za-z]+)*", text) is not None


def _word(text: str) -> str:
    text = _TEXT.sub(r"\1", text).strip(" .\"'")
    return (text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text).casefold()


def _as_single_as(given: str, expected: str) -> bool:
    """True if the given answer has no more values, words, signs of relation or letters than the expected one."""
    if len(_parts(given)) != len(_parts(expected)) or _spaced_numbers(given) or "$" in given.lstrip("$"):
        return False
    if _brackets(given) != _brackets(expected):
        return False
    own = set(_COMMAND.findall(expected))
    value = re.search("[A-Za-z]", _COMMAND.sub("", _TEXT.sub("", expected))) is None
    known = (_VALUES if value else _FUNCTIONS) | own | set(r"{}\%$")
    if not known.issuperset(_COMMAND.findall(given)):
        return False
    counts, allowed = Counter(_COUNTED.findall(given)), Counter(_COUNTED.findall(expected))
    if counts != allowed:
        return False
    letters = set(re.findall("[A-Za-z]", _COMMAND.sub(" ", expected)))
    words = re.findall("[A-Za-z]+", _COMMAND.sub(" ", given))
    return all(word in _VALUES or letters.issuperset(word) for word in words)


def _parts(text: str) -> list[str]:
    """The text split at its commas, those between thousands left out where no brackets make them a list's."""
    if re.search(r"[(\[]", text):
        return text.split(",")
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text).split(",")


def _spaced_numbers(text: str) -> bool:
    return re.search(r"[0-9.]\s+[0-9.]", re.sub(r"\\[A-Za-z]+\s*[0-9]\s+[0-9]", "", text)) is not None


def _brackets(text: str) -> str:
    r"""The brackets around a list: they tell (a, b) from [a, b]; a set's braces may be left out."""
    text = text.replace(r"\{", "").replace(r"\}", "")
    return f"{text[:1]}{text[-1:]}" if "," in text and text[:1] in ("(", "[") else ""


def _verified(given: str, expected: str) -> bool:
    import_verifier()
    from math_verify import LatexExtractionConfig, parse, verify

    # No limits of its own: they need SIGALRM, and the pool bounds the whole completion.
    read = partial(
        parse, extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    given = re.sub(r"(?<!\\)sqrt\(([^()]*)\)", r"\\sqrt{\1}", given)
    given = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", given)
    return bool(verify(read(f"${expected}$"), read(f"${given}$"), timeout_seconds=None))


def import_verifier() -> Any:
    """math-verify, which takes a second to import, with its warnings about missing limits silenced."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call without a limit
    return math_verify


def _last_group(text: str) -> str | None:
    r"""Content of the last \boxed{} that closes; None without one."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
