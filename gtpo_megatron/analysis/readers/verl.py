"""verl: `<trainer.rollout_data_dir>/<step>.jsonl`, one line a sample.

Keys: input, output, score, step, mostly gts, and the reward function's extra ones (verl/trainer/ppo/ray_trainer.py).
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from gtpo_megatron.analysis.dump import Completions, group_numbers, number
from gtpo_megatron.analysis.readers.files import Line, first_line, json_lines, need

FORMAT = "verl"
LACKS = (
    "token ids: the outputs' texts are tokenized again, which may differ from what was sampled, and the end-of-turn token is "
    "not there",
    "sampler's log-probabilities, finish reasons and weight versions",
    "group numbers: outputs of one input and step are taken as a group",
)
_FIXED = {"input", "output", "score", "step"}


def recognise(path: Path) -> bool:
    """Whether the file is a rollout dump of verl."""
    return set(first_line(path) or ()) >= _FIXED


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file, a step at a time.

    Raises:
        UserError: a line is damaged or lacks something.
    """
    for step, lines in groupby(json_lines(path), lambda line: need(path, line, "step", int)):
        yield _completions(path, step, list(lines))


def _completions(path: Path, step: int, lines: list[Line]) -> Completions:
    inputs = [need(path, line, "input", str) for line in lines]
    extra = {
        key
        for key, value in lines[0][1].items()
        if key not in _FIXED and isinstance(value, int | float) and key != "gts"
    }
    return Completions(
        step=step,
        source=path,
        rows=np.array([line[0] for line in lines]),
        groups=group_numbers(inputs),
        token_ids=None,
        offsets=None,
        rewards=np.array([number(line[1].get("score"), path, f"line {line[0]}", "score") for line in lines]),
        texts=[need(path, line, "output", str) for line in lines],
        prompts=inputs,
        terms={key: np.array([_or_nan(line[1].get(key)) for line in lines]) for key in sorted(extra)},
    )


def _or_nan(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
