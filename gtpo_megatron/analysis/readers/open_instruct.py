"""open-instruct: `<run>_rollouts_000000.jsonl`, one record a line.

Keys: step, sample_idx, prompt_idx, prompt_tokens, response_tokens, reward, advantage, finish_reason, dataset, and where known
logprobs, ground_truth, request_info (open_instruct/rl_utils.py).
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from gtpo_megatron.analysis.dump import Completions, flat, number
from gtpo_megatron.analysis.readers.files import Line, first_line, json_lines, need, token_list
from gtpo_megatron.errors import UserError

FORMAT = "open-instruct"
LACKS = (
    "which tokens a tool wrote: all of a response's tokens count as the policy's",
    "reward terms and weight versions",
)


def recognise(path: Path) -> bool:
    """Whether the file is a shard of open-instruct's rollouts."""
    return set(first_line(path) or ()) >= {"step", "prompt_idx", "prompt_tokens", "response_tokens", "reward"}


def read(path: Path) -> Iterator[Completions]:
    """The completions of a shard, a step at a time.

    Raises:
        UserError: a line is damaged or lacks something.
    """
    for step, lines in groupby(json_lines(path), lambda line: need(path, line, "step", int)):
        yield _completions(path, step, list(lines))


def _completions(path: Path, step: int, lines: list[Line]) -> Completions:
    token_ids, offsets = flat([token_list(path, line, "response_tokens") for line in lines])
    return Completions(
        step=step,
        source=path,
        rows=np.array([line[0] for line in lines]),
        groups=np.array([need(path, line, "prompt_idx", int) for line in lines], dtype=np.int64),
        token_ids=token_ids,
        offsets=offsets,
        rewards=np.array(
            [number(line[1].get("reward"), path, f"line {line[0]}", "reward") for line in lines]
        ),
        prompt_ids=[np.array(token_list(path, line, "prompt_tokens"), dtype=np.int32) for line in lines],
        logprobs=_logprobs(path, lines, np.diff(offsets)),
        truncated=np.array([line[1].get("finish_reason") == "length" for line in lines]),
    )


def _logprobs(path: Path, lines: list[Line], lengths: np.ndarray) -> np.ndarray | None:
    if not all(isinstance(line[1].get("logprobs"), list) for line in lines):
        return None
    for line, length in zip(lines, lengths, strict=True):
        if len(line[1]["logprobs"]) != length:
            raise UserError(
                f"{path}, line {line[0]}: {len(line[1]['logprobs'])} logprobs for {length} response_tokens"
            )
    return np.array([value for line in lines for value in line[1]["logprobs"]], dtype=np.float32)
