#!/usr/bin/env python
"""The same completions scored by our grader and by the field's: how often they agree, and where they do not.

    tools/grader_agreement.py --lm-eval PYTHON --sgl-eval PYTHON --data FOLDER EVALUATION...

EVALUATION is a directory that `gtpo-megatron evaluate` wrote: its completions are scored. FOLDER has gsm8k/test.jsonl and
math500/test.jsonl: their answers are scored, each in several places and spellings, right and wrong. PYTHON is an interpreter of a virtual environment
that has the grader (docs/evaluation.md says how to make them); it runs in a process of its own (tools/foreign_graders.py), which
knows nothing of this project. Prints Markdown; --json writes the counts.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gtpo_megatron.config import DataConfig
from gtpo_megatron.data.prompts import load_questions
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.results import grader, read_results
from gtpo_megatron.rewards.answers import stated_answer
from gtpo_megatron.rewards.terms import math_verify_correct
from gtpo_megatron.trajectories.store import TrajectoryStore

WORKER = Path(__file__).with_name("foreign_graders.py")
# where an answer stands, and how it is spelt: {a} is the reference, {b} another problem's
PLACES = {
    "tags": "<reasoning>\nThe two give it.\n</reasoning>\n<answer>\n{}\n</answer>",
    "box": "The two give it, so we have $\\boxed{{{}}}$.",
    "####": "The two give it.\n#### {}",
}
VALUES = {"plain": "{a}", "wrong": "{b}", "a dot": "{a}."}
NUMBERS = {
    "decimals": "{a}.00",
    "unit": "{a} apples",
    "money": "${a}",
    "a fraction": "{a}/1",
    "one of two": "{b} or {a}",
    "denied": "not {a}",
}
SENTENCES = {
    "a sentence": "The two give it. The answer is {a}.",
    "a sentence with money": "The two give it, so she pays ${a}.",
    "tags, and text after": PLACES["tags"].format("{a}") + "\nI checked it 2 times.",
}


def forms(values: dict[str, str], sentences: dict[str, str]) -> dict[str, Callable[[str, str], str]]:
    """name -> completion of (reference, another problem's answer)."""
    made = {
        f"{place}, {spelling}": lambda a, b, text=text, value=value: text.format(value.format(a=a, b=b))
        for place, text in PLACES.items()
        for spelling, value in values.items()
    }
    return made | {name: lambda a, b, text=text: text.format(a=a, b=b) for name, text in sentences.items()}


@dataclass(frozen=True)
class Row:
    """A completion to score."""

    set: str
    completion: str
    answer: str
    form: str = ""  # of an answer that was put into one


@dataclass(frozen=True)
class Disagreement:
    """A completion that ours and another grader judge differently, and what each read as its answer."""

    grader: str
    set: str
    form: str
    reason: str
    answer: str
    ours: str | None
    ours_right: bool
    theirs: str | None
    end: str  # the completion's last characters


@dataclass(frozen=True)
class Agreement:
    """A grader beside ours on a set. Where one finds no answer at all, there is no judgement to agree with."""

    set: str
    grader: str
    completions: int
    unread: int  # the other grader finds no answer
    agreed: int  # of the others
    disagreements: tuple[Disagreement, ...]  # of the others


def sampled(directory: Path) -> Iterator[Row]:
    """The completions of an evaluation."""
    for suite in read_results(directory)["suites"]:
        for trajectory in TrajectoryStore(directory / suite / "trajectories").read(0):
            yield Row(f"{directory.name}, {suite}", trajectory.text, trajectory.answer)


def formed(folder: Path, most: int) -> Iterator[Row]:
    """The answers of GSM8K and MATH-500, at most so many each, in every form."""
    gsm8k = DataConfig(path=str(folder / "gsm8k"), split="test", format="gsm8k", shuffle=False)
    math = DataConfig(path=str(folder / "math500"), split="test", format="fields", shuffle=False)
    math = math.model_copy(update={"fields": math.fields.model_copy(update={"question": "problem"})})
    of_numbers, of_any = forms(VALUES | NUMBERS, SENTENCES), forms(VALUES, {})
    for name, config, made in (("GSM8K's answers", gsm8k, of_numbers), ("MATH-500's answers", math, of_any)):
        answers = [question.answer for question in load_questions(config)]
        for place in sorted(random.Random(0).sample(range(len(answers)), min(most, len(answers)))):
            answer, other = answers[place], next(a for a in answers[place:] + answers if a != answers[place])
            for form, completion in made.items():
                yield Row(name, completion(answer, other), answer, form)


def foreign(name: str, python: str, rows: Sequence[Row]) -> dict[str, list[tuple[str | None, bool]]]:
    """For each grader of that name: what it read in each row, and whether it calls it right.

    Raises:
        UserError: the grader is not installed there, or fails.
    """
    given = "".join(f"{json.dumps({'completion': row.completion, 'answer': row.answer})}\n" for row in rows)
    command = [python, str(WORKER), name]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--{name} {python}: {' '.join(done.stderr.split()[-40:]) or done.returncode}")
    names, *verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        grader_name: [(row[place]["extracted"], row[place]["right"]) for row in verdicts]
        for place, grader_name in enumerate(names)
    }


def reason(ours: str | None, ours_right: bool, theirs: str) -> str:
    """Why two graders differ: they read different text as the answer, or judge the same text differently."""
    if ours is None:
        return "we find no answer"
    if "".join(ours.split()) == "".join(theirs.split()):
        return "same text, we call it " + ("right" if ours_right else "wrong")
    return "other text, ours is " + ("right" if ours_right else "wrong")


def compare(rows: Sequence[Row], graders: dict[str, list[tuple[str | None, bool]]]) -> list[Agreement]:
    """Each grader beside ours, on each set."""
    judged = [
        (stated_answer(row.completion), math_verify_correct(row.completion, row.answer) > 0) for row in rows
    ]
    found = []
    for name in dict.fromkeys(row.set for row in rows):
        for grader_name, verdicts in graders.items():
            members = [i for i, row in enumerate(rows) if row.set == name]
            read = [i for i in members if verdicts[i][0] is not None]
            differing = [i for i in read if judged[i][1] != verdicts[i][1]]
            disagreements = tuple(
                _disagreement(grader_name, rows[i], *judged[i], verdicts[i][0]) for i in differing
            )
            unread, agreed = len(members) - len(read), len(read) - len(differing)
            found.append(Agreement(name, grader_name, len(members), unread, agreed, disagreements))
    return found


def _disagreement(name: str, row: Row, ours: str | None, right: bool, theirs: str) -> Disagreement:
    why = reason(ours, right, theirs)
    return Disagreement(name, row.set, row.form, why, row.answer, ours, right, theirs, row.completion[-160:])


def groups(one: Agreement) -> dict[tuple[str, str], list[Disagreement]]:
    """The disagreements by form and reason."""
    found = defaultdict(list)
    for disagreement in one.disagreements:
        found[disagreement.form, disagreement.reason].append(disagreement)
    return found


def markdown(found: Sequence[Agreement]) -> str:
    """A table of agreement, and one of the disagreements by reason with an example each."""
    lines = [
        "| completions | number | grader | finds an answer in | agree | only we: right | only they: right |"
    ]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for one in found:
        read = one.completions - one.unread
        ours = sum(d.ours_right for d in one.disagreements)
        share = f"{one.agreed / read:.2%}" if read else "-"
        cells = [one.set, str(one.completions), one.grader, str(read), share]
        lines.append(f"| {' | '.join([*cells, str(ours), str(len(one.disagreements) - ours)])} |")
    lines += [
        "",
        "| completions | grader | form | reason | number | example: reference; we read; they read |",
    ]
    lines.append("| --- | --- | --- | --- | ---: | --- |")
    for one in found:
        for key, members in groups(one).items():
            first = members[0]
            texts = (first.answer, first.ours, first.theirs)
            example = " ".join("; ".join(f"`{text}`" for text in texts).replace("|", "\\|").split())
            lines.append(f"| {one.set} | {one.grader} | {' | '.join(key)} | {len(members)} | {example} |")
    return "\n".join(lines)


def as_dict(one: Agreement) -> dict[str, object]:
    """JSON-able: the counts, and the number of disagreements by form and reason with the first of each."""
    disagreements = [
        {"form": form, "reason": why, "number": len(members), "first": asdict(members[0])}
        for (form, why), members in groups(one).items()
    ]
    return asdict(one) | {"disagreements": disagreements}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", nargs="*", type=Path, metavar="EVALUATION")
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--most", type=int, default=100_000, help="answers of a set at most")
    parser.add_argument("--lm-eval", metavar="PYTHON")
    parser.add_argument("--sgl-eval", metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        rows = [row for directory in given.evaluations for row in sampled(directory)]
        rows += formed(given.data, given.most) if given.data else []
        if not rows:
            raise UserError("nothing to score: give evaluations, or --data")
        graders: dict[str, list[tuple[str | None, bool]]] = {}
        for name, python in (("lm-eval", given.lm_eval), ("sgl-eval", given.sgl_eval)):
            if python:
                graders |= foreign(name, python, rows)
        if not graders:
            raise UserError("no grader to compare with: give --lm-eval or --sgl-eval")
    except UserError as error:
        sys.exit(f"grader_agreement.py: {error}")
    found = compare(rows, graders)
    print(markdown(found))
    if given.json:
        result = {"grader": grader(), "agreement": [as_dict(one) for one in found]}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
