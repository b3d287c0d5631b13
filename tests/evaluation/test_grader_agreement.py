"""tools/grader_agreement.py: what it scores, what it says of a difference, and graders that are not there."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
GRADER = "stands in 1.0"
# takes the last number, as a worker in another interpreter would say it
WORKER = f"""
import json, re, sys
print(json.dumps(["{GRADER}"]))
for line in sys.stdin:
    row = json.loads(line)
    numbers = re.findall(r"[0-9]+", row["completion"])
    last = numbers[-1] if numbers else None
    print(json.dumps([{{"extracted": last, "right": last == row["answer"]}}]))
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("grader_agreement", ROOT / "tools" / "grader_agreement.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    rows = {
        "gsm8k": [{"question": f"{a}?", "answer": f"so\n#### {a}"} for a in (18, 1250)],
        "math500": [{"problem": "p?", "answer": answer} for answer in ("p - q", "\\frac{1}{2}")],
    }
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_answers_are_put_into_every_form(tool: ModuleType, answers: Path) -> None:
    rows = list(tool.formed(answers, 10))
    places, spellings = len(tool.PLACES), len(tool.VALUES)
    of_numbers = places * (spellings + len(tool.NUMBERS)) + len(tool.SENTENCES)
    assert len(rows) == 2 * of_numbers + 2 * places * spellings
    by_form = {(row.set, row.form): row.completion for row in rows if row.answer in ("18", "p - q")}
    assert by_form["GSM8K's answers", "####, one of two"] == "The two give it.\n#### 1250 or 18"
    assert by_form["GSM8K's answers", "box, wrong"].endswith("$\\boxed{1250}$.")
    assert by_form["MATH-500's answers", "tags, plain"].endswith("<answer>\np - q\n</answer>")
    assert len(list(tool.formed(answers, 1))) == of_numbers + places * spellings


def test_disagreements_are_counted_and_shown(
    tool: ModuleType,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(tool, "WORKER", worker)
    out = tmp_path / "agreement.json"
    tool.main(["--data", str(answers), "--lm-eval", sys.executable, "--json", str(out)])
    text = capsys.readouterr().out
    other = "other text, ours is right"
    assert f"| GSM8K's answers | {GRADER} | tags, and text after | {other} | 2 | `18`; `18`; `2` |" in text
    numbers, math = json.loads(out.read_text())["agreement"]
    assert (numbers["set"], math["set"]) == ("GSM8K's answers", "MATH-500's answers")
    assert math["unread"] > 0  # p - q has no number
    for found in (numbers, math):
        differing = sum(group["number"] for group in found["disagreements"])
        assert found["completions"] == found["unread"] + found["agreed"] + differing
    (denied,) = [d for d in numbers["disagreements"] if d["form"] == "tags, denied"]
    assert (denied["number"], denied["reason"]) == (2, "other text, ours is wrong")
    first = denied["first"]
    assert (first["ours"], first["ours_right"], first["theirs"]) == ("not 18", False, "18")
    forms = {d["form"] for d in numbers["disagreements"] if d["form"].startswith("box")}
    assert forms == {"box, decimals", "box, a fraction", "box, one of two", "box, denied"}


def test_a_grader_that_is_not_installed_and_nothing_to_do(tool: ModuleType, answers: Path) -> None:
    with pytest.raises(SystemExit, match=r"--sgl-eval .*No module named 'sgl_eval'"):
        tool.main(["--data", str(answers), "--sgl-eval", sys.executable])
    with pytest.raises(SystemExit, match="no grader to compare with"):
        tool.main(["--data", str(answers)])
    with pytest.raises(SystemExit, match="nothing to score"):
        tool.main(["--lm-eval", sys.executable])
