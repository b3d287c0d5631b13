"""NeMo-RL: `<log_dir>/exp_NNN/train_data_step12.jsonl`, one line a sample.

Keys: rewards, input_lengths, token_ids, token_loss_mask, generation_logprobs, prev_logprobs, mostly content
(nemo_rl/algorithms/grpo.py). A sequence holds prompt and answer, padded to the batch's longest.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.analysis.dump import Completions, flat, group_numbers, number
from gtpo_megatron.analysis.readers.files import Line, first_line, json_lines, need, step_of, token_list
from gtpo_megatron.errors import UserError

FORMAT = "nemo-rl"
LACKS = (
    "finish reasons and weight versions",
    "group numbers: samples of one prompt and step are taken as a group",
    "reward terms: only their sum",
)


def recognise(path: Path) -> bool:
    """Whether the file is NeMo-RL's training data of a step."""
    return set(first_line(path) or ()) >= {"rewards", "input_lengths", "token_ids", "token_loss_mask"}


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file; its name says the step.

    Raises:
        UserError: a line is damaged or lacks something.
    """
    lines = list(json_lines(path))
    parts = [_split(path, line) for line in lines]
    answers = [tokens[mask] for tokens, mask in parts]
    prompts = [tokens[: int(mask.argmax())] for tokens, mask in parts]
    token_ids, offsets = flat([answer.tolist() for answer in answers])
    yield Completions(
        step=step_of(path, r"step_?(\d+)\.jsonl"),
        source=path,
        rows=np.array([line[0] for line in lines]),
        groups=group_numbers([prompt.tobytes() for prompt in prompts]),
        token_ids=token_ids,
        offsets=offsets,
        rewards=np.array([number(line[1]["rewards"], path, f"line {line[0]}", "rewards") for line in lines]),
        prompt_ids=prompts,
        logprobs=_logprobs(path, lines, [mask for _, mask in parts]),
    )


def _split(path: Path, line: Line) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The sequence without padding, and which of its tokens were generated."""
    length = need(path, line, "input_lengths", int)
    tokens = np.array(token_list(path, line, "token_ids")[:length], dtype=np.int32)
    mask = np.array(need(path, line, "token_loss_mask", list)[:length], dtype=bool)
    if len(mask) != len(tokens):
        raise UserError(
            f"{path}, line {line[0]}: {len(mask)} entries of token_loss_mask for {len(tokens)} token_ids"
        )
    return tokens, mask


def _logprobs(path: Path, lines: list[Line], masks: list[NDArray[np.bool_]]) -> NDArray[np.float32] | None:
    if not all("generation_logprobs" in line[1] for line in lines):
        return None
    parts = []
    for line, mask in zip(lines, masks, strict=True):
        values = np.array(need(path, line, "generation_logprobs", list)[: len(mask)], dtype=np.float32)
        if len(values) != len(mask):
            raise UserError(
                f"{path}, line {line[0]}: {len(values)} generation_logprobs for {len(mask)} token_ids"
            )
        parts.append(values[mask])
    return np.concatenate(parts)
