"""How a row of a known data set gives its question, answer and worked solution."""

import math
import re
from dataclasses import dataclass
from typing import Any

from gtpo_megatron.config import DataConfig

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """A row, read."""

    id: str
    question: str
    answer: str
    solution: str | None


def parse_row(config: DataConfig, number: int, row: dict[str, Any] | None) -> Example:
    """Read one row.

    Raises:
        ValueError: what is wrong with the row; the caller adds the file and the row number.
    """
    if row is None:
        raise ValueError("is not a JSON object")
    if config.format == "gsm8k":
        question, answer, solution = _gsm8k(row)
    elif config.format == "math":
        question, answer, solution = _math(row)
    else:
        fields = config.fields
        question, answer = _text(row, fields.question), _text(_single(row, fields.answer), fields.answer)
        solution = _text(row, fields.solution) if fields.solution else None
    row_id = _text(row, config.fields.id) if config.fields.id else str(number)
    return Example(row_id, question, answer, solution)


def _single(row: dict[str, Any], field: str) -> dict[str, Any]:
    """A list of one answer is that answer (OlympiadBench has such)."""
    value = row.get(field)
    return row | {field: value[0]} if isinstance(value, list) and len(value) == 1 else row


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        raise ValueError(f"has no field '{field}' (fields: {', '.join(row) or 'none'})")
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"field '{field}' must be text or a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field '{field}' is {value}, not a finite number")
    text = str(value).strip()
    if not text:
        raise ValueError(f"field '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise ValueError(f"field '{field}' is not valid Unicode") from None
    return text


def _gsm8k(row: dict[str, Any]) -> tuple[str, str, str | None]:
    """GSM8K: the solution, then `#### answer`; `<<2*3=6>>` are calculator calls of its authors' models."""
    question = _text(row, "question")
    working, marker, answer = _text(row, "answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker:
        raise ValueError("field 'answer' has no '#### <answer>' (format: gsm8k)")
    if not answer:
        raise ValueError("field 'answer' has nothing after '####' (format: gsm8k)")
    return question, answer, _CALCULATOR.sub("", working).strip() or None


def _math(row: dict[str, Any]) -> tuple[str, str, str | None]:
    """Hendrycks MATH: the answer column where there is one, else the last \\boxed{} of the solution."""
    question = _text(row, "problem")
    if row.get("answer") is not None:
        answer = _text(row, "answer")
        return question, answer, _text(row, "solution") if row.get("solution") else None
    solution = _text(row, "solution")
    answer = last_boxed(solution)
    if not answer:
        raise ValueError("has no field 'answer', and its solution has no \\boxed{...} (format: math)")
    return question, answer, solution


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` or `\\fbox{...}`, nested braces included; None if there is none that closes."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # an escaped brace is text
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[start:position].strip()
        position += 1
    return None
