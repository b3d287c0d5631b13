"""prime-rl: `rollouts/step_N/train/effective/traces.jsonl`, one episode of verifiers a line.

An episode has a task, a group and traces; a trace a graph of messages, each with the tokens that it adds and which of them were
sampled, and named, weighted rewards (verifiers/v1/episode.py, trace.py, graph.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.analysis.dump import Completions, flat, group_numbers, number
from gtpo_megatron.analysis.readers.files import Line, first_line, json_lines, need, step_of, token_list
from gtpo_megatron.errors import UserError

FORMAT = "prime-rl"
LACKS = (
    "branches: of a conversation that branches, the one that ends last is read",
    "advantages as one number a completion: GTPO's are computed from the rewards",
)


@dataclass(frozen=True)
class _Sample:
    line: int
    step: int
    group: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]
    rewards: dict[str, float]  # unweighted
    reward: float
    truncated: bool
    staleness: float


def recognise(path: Path) -> bool:
    """Whether the file holds episodes of verifiers."""
    first = first_line(path) or {}
    return {"task", "traces"} <= set(first) and isinstance(first["traces"], list)


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file, a step at a time; episodes that failed are left out, as in training.

    Raises:
        UserError: a line is damaged or lacks something.
    """
    lines = (line for line in json_lines(path) if line[1].get("ok", True))
    samples = (sample for line in lines for sample in _samples(path, line))
    for step, members in groupby(samples, lambda sample: sample.step):
        yield _completions(path, step, list(members))


def _samples(path: Path, line: Line) -> Iterator[_Sample]:
    episode = line[1]
    work = (episode.get("run") or {}).get("work") or {}
    task = episode.get("task") or {}
    group = (episode.get("group") or {}).get("id") or task.get("key") or task.get("hash")
    if group is None:
        raise UserError(
            f"{path}, line {line[0]}: the episode has neither group.id nor task.key nor task.hash"
        )
    step = step_of(path, r"step_(\d+)/") or work.get("step", 0)
    policy = work.get("policy") or {}
    for trace in need(path, line, "traces", list):
        if not (trace.get("agent") or {}).get("trainable", True):
            continue
        nodes = _last_branch(path, line, trace.get("nodes") or [])
        sampled = [_sampled(path, line, node) for node in nodes]
        first = next((i for i, tokens in enumerate(sampled) if tokens), len(nodes))
        terms = {
            name: (value["score"], value.get("weight", 1.0))
            for name, value in (trace.get("rewards") or {}).items()
            if value is not None
        }
        reasons = [call.get("finish_reason") for call in trace.get("calls") or []]
        reasons += [node["finish_reason"] for node in nodes if node.get("finish_reason")]
        yield _Sample(
            line=line[0],
            step=step,
            group=str(group),
            prompt=[token for node in nodes[: first + 1] for token in _scaffold(node)],
            tokens=[token for tokens in sampled for token in tokens],
            logprobs=[value for node in nodes for value in node.get("logprobs") or []],
            entropies=[value for node in nodes for value in node.get("entropies") or []],
            rewards={name: score for name, (score, _) in terms.items()},
            reward=number(
                sum(score * weight for score, weight in terms.values()), path, f"line {line[0]}", "the reward"
            ),
            truncated=bool(reasons) and reasons[-1] == "length",
            staleness=float(step - policy["start"]) if "start" in policy else float("nan"),
        )


def _last_branch(path: Path, line: Line, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    branch, index = [], len(nodes) - 1
    while index is not None and index >= 0:
        branch.append(nodes[index])
        parent = nodes[index].get("parent")
        if parent is not None and not 0 <= parent < index:
            raise UserError(
                f"{path}, line {line[0]}: node {index} has parent {parent}; it must stand before it"
            )
        index = parent
    return branch[::-1]


def _sampled(path: Path, line: Line, node: dict[str, Any]) -> list[int]:
    tokens, mask = token_list(path, (line[0], node), "token_ids"), node.get("mask") or []
    if len(mask) != len(tokens):
        raise UserError(f"{path}, line {line[0]}: a node has {len(tokens)} token_ids and {len(mask)} in mask")
    return [token for token, is_sampled in zip(tokens, mask, strict=True) if is_sampled]


def _scaffold(node: dict[str, Any]) -> list[int]:
    return [
        token for token, is_sampled in zip(node["token_ids"], node["mask"], strict=True) if not is_sampled
    ]


def _completions(path: Path, step: int, samples: list[_Sample]) -> Completions:
    token_ids, offsets = flat([sample.tokens for sample in samples])
    names = sorted({name for sample in samples for name in sample.rewards})
    staleness = np.array([sample.staleness for sample in samples])

    def per_token(lists: list[list[float]]) -> np.ndarray | None:
        known = all(len(values) == len(s.tokens) for values, s in zip(lists, samples, strict=True))
        return np.array([value for values in lists for value in values], dtype=np.float32) if known else None

    return Completions(
        step=step,
        source=path,
        rows=np.array([sample.line for sample in samples]),
        groups=group_numbers([sample.group for sample in samples]),
        token_ids=token_ids,
        offsets=offsets,
        rewards=np.array([sample.reward for sample in samples]),
        prompt_ids=[np.array(sample.prompt, dtype=np.int32) for sample in samples],
        logprobs=per_token([sample.logprobs for sample in samples]),
        entropies=per_token([sample.entropies for sample in samples]),
        truncated=np.array([sample.truncated for sample in samples]),
        staleness=None if np.isnan(staleness).any() else staleness,
        terms={name: np.array([s.rewards.get(name, np.nan) for s in samples]) for name in names},
    )
