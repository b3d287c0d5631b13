#!/usr/bin/env python
"""Write the table of all keys in docs/configuration.md from the models in gtpo_megatron/config.

tools/make_config_docs.py          write it
tools/make_config_docs.py --check  exit code 1 if it is not current
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gtpo_megatron.config import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
BAR = r"\|"
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}


def keys_markdown() -> str:
    """One table for every section, headings included."""
    blocks = []
    for prefix, section in sections(RunConfig):
        rows = [row(prefix, name, field) for name, field in section.model_fields.items() if is_key(field)]
        summary = (section.__doc__ or "").strip().splitlines()[0]
        title = f"`{prefix.rstrip('.')}`" if prefix else "The top level"
        blocks.append(
            f"### {title}\n\n{summary}\n\n| key | values | default | meaning |\n| --- | --- | --- | --- |\n"
            + "\n".join(rows)
        )
    return "\n\n".join(blocks)


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with the prefix of its keys, parents first; `evaluation.data` is described by `data`."""
    yield prefix, model
    seen = set()
    for name, field in model.model_fields.items():
        section, is_list = section_of(field.annotation)
        if section is None or section in seen or (prefix and f"{prefix}{name}" == "evaluation.data"):
            continue
        seen.add(section)
        yield from sections(section, f"{prefix}{name}{'[]' if is_list else ''}.")


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    found = [section_of(arg)[0] for arg in get_args(annotation)]
    return next((section for section in found if section), None), get_origin(annotation) is tuple


def is_key(field: FieldInfo) -> bool:
    """Whether a field has a row of its own: a plain value, a list of sections, or a section that may be absent."""
    return not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))


def row(prefix: str, name: str, field: FieldInfo) -> str:
    """One line of a table."""
    cells = (f"`{prefix}{name}`", values(field), default(field), field.description or "")
    return f"| {' | '.join(cell.replace('|', BAR).replace('<', '&lt;') for cell in cells)} |"


def values(field: FieldInfo) -> str:
    """The type and bounds in words."""
    bounds = []
    for constraint in field.metadata:
        for kind, (attribute, sign) in SIGNS.items():
            if isinstance(constraint, kind):
                bounds.append(f"{sign} {getattr(constraint, attribute):g}")
    text, null, _ = type_text(field.annotation).partition(", or null")
    return f"{text} {' and '.join(bounds)}".strip() + null


def type_text(annotation: Any) -> str:
    """`int | None` -> "integer, or null"; a Literal -> its values."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return ", or ".join("null" if arg is NoneType else type_text(arg) for arg in args)
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES[annotation]


def default(field: FieldInfo) -> str:
    """The default as YAML would have it; bold where there is none."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict):
        items = [item.kind if isinstance(item, BaseModel) else str(item) for item in value]
        return ", ".join(f"`{item}`" for item in items) or "empty"
    return f"`{value!r}`" if isinstance(value, float) else f"`{value or repr(value)}`"


def updated(text: str) -> str:
    """The page with the table between its marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE.name}: the marks {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{keys_markdown()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if it is not current"
    )
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    new = updated(text)
    if check and new != text:
        sys.exit(f"{PAGE.name} is not current: run tools/make_config_docs.py")
    if new != text:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
