#!/usr/bin/env python
"""Completions scored by other projects' graders, in an interpreter that has them; nothing of this project is imported.

    PYTHON tools/foreign_graders.py lm-eval  < rows.jsonl > verdicts.jsonl
    PYTHON tools/foreign_graders.py sgl-eval < rows.jsonl > verdicts.jsonl

A row has `completion` and `answer`. The first line that is written names the graders, each other one has, for each of them,
what it read as the answer, `extracted` (null: nothing), and `right`. tools/grader_agreement.py calls this.
"""

import asyncio
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Verdict = dict[str, Any]  # extracted, right
Grader = Callable[[str, str], Verdict]


def lm_eval_gsm8k() -> dict[str, Grader]:
    """lm-evaluation-harness' task gsm8k: the filters and the metric that its own task file names."""
    import yaml
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load(
        (Path(sys.modules["lm_eval"].__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text()
    )
    (metric,) = task["metric_list"]
    options = {
        key: value
        for key, value in metric.items()
        if key not in ("metric", "aggregation", "higher_is_better")
    }

    def grader(steps: list[dict[str, Any]]) -> Grader:
        regex = RegexFilter(
            **{k: v for k, v in steps[0].items() if k != "function"}
        )  # the other step takes the first response

        def grade(completion: str, answer: str) -> Verdict:
            extracted = regex.apply([[completion]], [{}])[0][0]
            score = exact_match_fn(predictions=[extracted], references=[answer], **options)["exact_match"]
            return {
                "extracted": None if extracted == regex.fallback else extracted,
                "right": bool(score),
            }

        return grade

    version = f"lm-eval {importlib.metadata.version('lm_eval')}, gsm8k {task['metadata']['version']:g}"
    return {f"{version}, {entry['name']}": grader(entry["filter"]) for entry in task["filter_list"]}


def sgl_eval_math() -> dict[str, Grader]:
    """sgl-eval's grader of mathematics, which is NeMo-Skills' with its defaults."""
    from sgl_eval._vendored.nemo_skills.evaluator.math import MathEvaluator

    evaluator = MathEvaluator(config={})

    def grade(completion: str, answer: str) -> Verdict:
        found = asyncio.run(evaluator.eval_single({"generation": completion, "expected_answer": answer}))
        return {"extracted": found["predicted_answer"], "right": bool(found["symbolic_correct"])}

    return {f"sgl-eval {importlib.metadata.version('sgl-eval')}, NeMo-Skills' math": grade}


GRADERS: dict[str, Callable[[], dict[str, Grader]]] = {"lm-eval": lm_eval_gsm8k, "sgl-eval": sgl_eval_math}


def main(name: str) -> None:
    """Grade standard input's rows."""
    graders = GRADERS[name]()
    print(json.dumps(list(graders)), flush=True)
    for line in sys.stdin:
        row = json.loads(line)
        print(json.dumps([grade(row["completion"], row["answer"]) for grade in graders.values()]))


if __name__ == "__main__":
    main(sys.argv[1])
