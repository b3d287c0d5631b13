"""Our grader beside lm-eval's GSM8K rules on stored completions: every disagreement is a known one, and explained."""

import json
from collections import Counter
from pathlib import Path

import pytest

from gtpo_megatron.rewards.terms import math_verify_correct
from tests.evaluation.lm_eval_gsm8k import flexible_extract, strict_match

ROOT = Path(__file__).parents[2]
ROWS = [
    json.loads(line)
    for line in (ROOT / "tests" / "fixtures" / "gsm8k_completions.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["completion"][:40])
def test_the_two_agree_but_for_what_is_explained(row: dict[str, str | None]) -> None:
    ours = math_verify_correct(row["completion"], row["answer"]) > 0
    theirs = flexible_extract(row["completion"], row["answer"])
    assert (ours != theirs) == (row["disagreement"] is not None), (ours, theirs)


def test_the_page_explains_each_disagreement_and_states_the_agreement() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    reasons = Counter(row["disagreement"] for row in ROWS)
    agreed = reasons.pop(None)
    assert {reason for reason in reasons if f"| {reason} |" not in page} == set()
    assert f"{agreed} of {len(ROWS)}" in page


def test_their_rules_on_gsm8ks_own_form() -> None:
    answer = "Janet sells 9 eggs.\nShe makes $18.\n#### 18"
    assert strict_match("so\n#### 18", answer) and flexible_extract("that is $18.", answer)
    assert not strict_match("that is 18", answer)
    assert strict_match("#### 1,250.", "x\n#### 1250")
    assert not flexible_extract("no number", answer)
