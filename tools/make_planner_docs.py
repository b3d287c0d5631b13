"""Write the table of docs/planner.md: what the planner predicts of the published rows in tests/fixtures/published-h100.csv."""

import re
from pathlib import Path

from gtpo_megatron.plan.published import compare

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planner.md"
ROWS = ROOT / "tests" / "fixtures" / "published-h100.csv"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def shown(value: float) -> str:
    """Four digits at least, and no exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def updated(text: str) -> str:
    """The page with the table as the program gives it now."""
    lines = ["| row | kind | predicted | published | error |", "| --- | --- | --- | --- | --- |"]
    for c in compare(ROWS):
        unit = c.unit.partition(" (")[0]
        lines.append(
            f"| {c.id} | {c.kind} | {shown(c.predicted)} | {c.published:g} {unit} | {c.error:+.1%} |"
        )
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", text)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
