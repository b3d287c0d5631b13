"""lm-evaluation-harness' rules for GSM8K, written anew from what its task file documents (gsm8k.yaml, version 3).

strict-match takes the first number after "#### "; flexible-extract the last thing that looks like a number. Extracted and
expected text are compared as strings, case ignored, after removing commas, dollar signs, all up to "#### ", and a last dot.
"""

import re

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def strict_match(completion: str, answer: str) -> bool:
    """The score of filter strict-match. `answer`: the solution as GSM8K has it, or the number alone."""
    found = _STRICT.findall(completion)
    return _same(found[0] if found else "[invalid]", answer)


def flexible_extract(completion: str, answer: str) -> bool:
    """The score of filter flexible-extract."""
    found = [one or other for one, other in _FLEXIBLE.findall(completion)]
    return _same(found[-1].strip() if found else "[invalid]", answer)


def _same(given: str, expected: str) -> bool:
    return _plain(given) == _plain(expected)


def _plain(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
