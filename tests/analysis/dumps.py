"""Small dumps of every framework, all with the same completions: what a reader must find in each of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

PROMPTS = [[7, 8], [7, 9]]
# (group, tokens, reward): group 0 begins with the same two tokens and ends with the same one on both sides; group 1 has no signal
COMPLETIONS = [
    (0, [11, 12, 13, 2], 1.0),
    (0, [11, 12, 14, 15, 2], 0.0),
    (0, [11, 20, 2], 0.0),
    (1, [30, 31], 1.0),
    (1, [30, 32], 1.0),
]
FIGURES = {
    "completions": 5,
    "groups": 2,
    "tokens": 16,
    "protected_tokens": 5,  # 11 12 . . 2 and 11 . 2
    "amplified_tokens": 3,  # 11 12 . 2
    "groups_without_signal": 1,
}
STEP = 4


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def ours(folder: Path) -> Path:
    advantages = [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0]
    TrajectoryStore(folder / "trajectories").write(
        STEP,
        [
            Trajectory(
                step=STEP,
                group=group,
                index=index,
                prompt_id=str(group),
                prompt_ids=np.array(PROMPTS[group], np.int32),
                token_ids=np.array(tokens, np.int32),
                logprobs=np.full(len(tokens), -0.5, np.float32),
                token_versions=np.full(len(tokens), STEP - 1, np.int32),
                finish_reason="length" if index == 1 else "stop",
                text=" ".join(map(str, tokens)),
                reward=reward,
                reward_terms={"right": reward},
                advantage=advantages[index],
            )
            for index, (group, tokens, reward) in enumerate(COMPLETIONS)
        ],
    )
    return folder


def nemo_rl(folder: Path) -> Path:
    rows = []
    for group, tokens, reward in COMPLETIONS:
        sequence = PROMPTS[group] + tokens
        padding = 9 - len(sequence)
        mask = [0, 0] + [1] * len(tokens)
        rows.append(
            {
                "content": "text",
                "rewards": reward,
                "input_lengths": len(sequence),
                "token_ids": sequence + [0] * padding,
                "token_loss_mask": mask + [0] * padding,
                "generation_logprobs": [-0.5 * m for m in mask] + [0.0] * padding,
            }
        )
    return write_jsonl(folder / f"train_data_step{STEP}.jsonl", rows).parent


def open_instruct(folder: Path) -> Path:
    rows = [
        {
            "step": STEP,
            "sample_idx": index,
            "prompt_idx": group,
            "prompt_tokens": PROMPTS[group],
            "response_tokens": tokens,
            "reward": reward,
            "advantage": 0.1,
            "finish_reason": "stop",
            "dataset": "gsm8k",
            "logprobs": [-0.5] * len(tokens),
        }
        for index, (group, tokens, reward) in enumerate(COMPLETIONS)
    ]
    write_jsonl(folder / "run_metadata.jsonl", [{"run_name": "run", "model_name": "x"}])
    return write_jsonl(folder / "run_rollouts_000000.jsonl", rows).parent


def prime_rl(folder: Path) -> Path:
    rows = []
    for group, tokens, reward in COMPLETIONS:
        prompt = {"parent": None, "token_ids": PROMPTS[group], "mask": [False] * 2}
        answer = {
            "parent": 0,
            "token_ids": [5, *tokens],
            "mask": [False] + [True] * len(tokens),
            "logprobs": [-0.5] * len(tokens),
            "finish_reason": "stop",
        }
        rewards = {"right": {"score": 2 * reward, "weight": 0.5}, "skipped": None}
        trace = {"nodes": [prompt, answer], "rewards": rewards}
        work = {"type": "train", "step": STEP, "policy": {"start": STEP - 1, "end": STEP}}
        rows.append(
            {"task": {}, "group": {"id": f"g{group}"}, "run": {"work": work}, "ok": True, "traces": [trace]}
        )
    rows.append({"task": {"key": "k"}, "ok": False, "traces": []})
    step = folder / "rollouts" / f"step_{STEP}"
    write_jsonl(step / "eval" / "all" / "traces.jsonl", rows)
    write_jsonl(step / "train" / "all" / "traces.jsonl", rows)
    write_jsonl(step / "train" / "effective" / "traces.jsonl", rows)
    return folder


def slime(folder: Path) -> Path:
    samples = [
        {
            "group_index": group,
            "index": index,
            "prompt": "p",
            "tokens": PROMPTS[group] + tokens,
            "response": "text",
            "response_length": len(tokens),
            "reward": reward,
            "loss_mask": None,
            "rollout_log_probs": [-0.5] * len(tokens),
            "status": "completed",
        }
        for index, (group, tokens, reward) in enumerate(COMPLETIONS)
    ]
    folder.mkdir(exist_ok=True)
    torch.save({"rollout_id": STEP, "samples": samples}, folder / f"{STEP}.pt")
    return folder


def words(tokens: list[int]) -> str:
    """Letters, one token each for a tokenizer without merges of them."""
    return "".join(chr(ord("A") + token % 26) for token in tokens)


def trl(folder: Path) -> Path:
    advantages = [1.15, -0.57, -0.57, 0.0, 0.0]
    (folder / "completions").mkdir(parents=True)
    table = {
        "step": [STEP] * 5,
        "prompt": [f"question {group}" for group, _, _ in COMPLETIONS],
        "completion": [words(tokens) for _, tokens, _ in COMPLETIONS],
        "reward_right": [reward for _, _, reward in COMPLETIONS],
        "advantage": advantages,
    }
    pq.write_table(pa.table(table), folder / "completions" / "completions_00004.parquet")
    return folder


def verl(folder: Path) -> Path:
    rows = [
        {
            "input": f"q{group}",
            "output": words(tokens),
            "gts": "1",
            "score": reward,
            "step": STEP,
            "acc": reward,
        }
        for group, tokens, reward in COMPLETIONS
    ]
    return write_jsonl(folder / f"{STEP}.jsonl", rows).parent


WITH_TOKENS: dict[str, Callable[[Path], Path]] = {
    "gtpo-megatron": ours,
    "nemo-rl": nemo_rl,
    "open-instruct": open_instruct,
    "prime-rl": prime_rl,
    "slime": slime,
}
TEXTS_ALONE: dict[str, Callable[[Path], Path]] = {"trl": trl, "verl": verl}
