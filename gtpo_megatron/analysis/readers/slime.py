"""slime: rollout data of its debug mode, `torch.save` of {rollout_id, samples}; each sample a dictionary (slime/utils/types.py).

Such a file is a pickle: loading it can run any code. It is loaded only where the user trusts it.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.analysis.dump import Completions, flat, number
from gtpo_megatron.errors import UserError

FORMAT = "slime"
LACKS = ("reward terms, where the reward is one number",)


def recognise(path: Path) -> bool:
    """Whether the file is one of torch.save. Nothing of it is loaded."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file that the user trusts.

    Raises:
        UserError: it cannot be loaded, or holds something else.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever a pickle's own code raises
        raise UserError(f"{path}: cannot be loaded: {error}") from error
    samples = content.get("samples") if isinstance(content, dict) else None
    if not samples or not all(isinstance(sample, dict) for sample in samples):
        raise UserError(f"{path}: no slime rollout: a dictionary with samples is expected")
    answers = [_answer(path, index, sample) for index, sample in enumerate(samples)]
    token_ids, offsets = flat([tokens for _, tokens in answers])
    logprobs = [sample.get("rollout_log_probs") for sample in samples]
    terms = sorted({name for s in samples if isinstance(s["reward"], dict) for name in s["reward"]})
    known = all(
        values is not None and len(values) == len(sample["tokens"]) - len(prompt) and _all_generated(sample)
        for values, sample, (prompt, _) in zip(logprobs, samples, answers, strict=True)
    )
    yield Completions(
        step=int(content.get("rollout_id") or 0),
        source=path,
        rows=np.arange(len(samples)),
        groups=np.array([_group(path, i, sample) for i, sample in enumerate(samples)], dtype=np.int64),
        token_ids=token_ids,
        offsets=offsets,
        rewards=np.array([_reward(path, index, sample) for index, sample in enumerate(samples)]),
        texts=[str(sample.get("response", "")) for sample in samples],
        prompt_ids=[np.array(prompt, dtype=np.int32) for prompt, _ in answers],
        logprobs=np.array([v for values in logprobs for v in values], dtype=np.float32) if known else None,
        truncated=np.array([sample.get("status") == "truncated" for sample in samples]),
        terms={name: np.array([_term(s["reward"], name) for s in samples]) for name in terms},
    )


def _answer(path: Path, index: int, sample: dict[str, Any]) -> tuple[list[int], list[int]]:
    tokens, length = list(sample.get("tokens") or []), int(sample.get("response_length") or 0)
    mask = sample.get("loss_mask")
    if not 0 <= length <= len(tokens) or (mask is not None and len(mask) != length):
        raise UserError(
            f"{path}, sample {index}: response_length {length} does not fit its tokens or loss_mask"
        )
    start = len(tokens) - length
    answer = tokens[start:]
    return tokens[:start], [t for t, use in zip(answer, mask or [1] * length, strict=True) if use]


def _all_generated(sample: dict[str, Any]) -> bool:
    return sample.get("loss_mask") is None or all(sample["loss_mask"])


def _group(path: Path, index: int, sample: dict[str, Any]) -> int:
    if not isinstance(sample.get("group_index"), int):
        raise UserError(f"{path}, sample {index}: group_index is {sample.get('group_index')!r}, not a number")
    return sample["group_index"]


def _reward(path: Path, index: int, sample: dict[str, Any]) -> float:
    reward = sample.get("reward")
    if isinstance(reward, dict):  # which entry is trained on is an argument of the run (--reward-key)
        reward = reward.get("score", next(iter(reward.values())) if len(reward) == 1 else None)
    return number(reward, path, f"sample {index}", "reward")


def _term(reward: Any, name: str) -> float:
    value = reward.get(name) if isinstance(reward, dict) else None
    return float(value) if isinstance(value, int | float) else float("nan")
