"""From prompts to analysed trajectories: sample groups, score each as it arrives, compare the completions of a group."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gtpo_megatron import control
from gtpo_megatron.algorithm import conflict_runs, group_advantages
from gtpo_megatron.data.prompts import Prompt, solution_ids
from gtpo_megatron.rewards.pool import RewardPool, Score
from gtpo_megatron.rollout.protocol import Group, PromptRequest, RolloutEngine, SamplingParams
from gtpo_megatron.trajectories.record import Trajectory


@dataclass(frozen=True)
class GroupPrompt:
    """A prompt at its place in the batch."""

    group: int
    prompt: Prompt
    seed: int
    index: int  # of the prompt in its set


def group_seed(run_seed: int, step: int, group: int) -> int:
    """A seed of its own for every group of a run, so that results do not depend on batching, ranks or restarts."""
    return int(np.random.SeedSequence([run_seed, step, group]).generate_state(1, np.uint64)[0] >> 2)


def sample_share(
    engine: RolloutEngine,
    rewards: RewardPool,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[GroupPrompt],
    params: SamplingParams,
    step: int,
    keep: int | None = None,
    turn: AbstractContextManager[None] | None = None,
) -> list[Trajectory]:
    """Sample and score this rank's share of the prompts. Without collectives: it may run beside training.

    `keep` ends sampling once so many groups are finished (oversampling); the others are aborted. `turn` is held while the
    engine is used, and not while the last scores are waited for.
    """
    by_group = {p.group: p for p in prompts}
    requests = [PromptRequest(p.group, p.prompt.prompt_ids, p.seed) for p in prompts]
    arrived = []
    with turn or nullcontext():
        groups = engine.generate(requests, params)
        for group in groups:
            prompt = by_group[group.request.group].prompt
            texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in group.completions]
            scores = rewards.submit([(text, prompt.answer, prompt.question) for text in texts])
            arrived.append((group, prompt, texts, scores))
            if keep is not None and len(arrived) == keep:
                groups.close()
                break
    scored = [(group, prompt, texts, scores.result()) for group, prompt, texts, scores in arrived]
    rewards.check([score for *_, scores in scored for score in scores])
    return [
        trajectory
        for group, prompt, texts, scores in scored
        for trajectory in _trajectories(step, group, prompt, texts, scores)
    ]


def _trajectories(
    step: int, group: Group, prompt: Prompt, texts: Sequence[str], scores: Sequence[Score]
) -> list[Trajectory]:
    return [
        Trajectory(
            step=step,
            group=group.request.group,
            index=index,
            prompt_id=prompt.id,
            prompt_ids=np.asarray(prompt.prompt_ids, np.int32),
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            token_versions=completion.token_versions,
            finish_reason=completion.finish_reason,
            text=text,
            answer=prompt.answer,
            reward=score.total,
            reward_terms=score.terms,
            reward_error=score.error,
            seconds=completion.seconds,
        )
        for index, (completion, text, score) in enumerate(zip(group.completions, texts, scores, strict=True))
    ]


def gather(own: list[Trajectory] | Exception) -> list[Trajectory]:
    """All ranks' trajectories, by group and index, on rank 0; none elsewhere.

    Collective; an exception of any rank is raised on all (see `control.raise_together`).
    """
    control.raise_together(own if isinstance(own, Exception) else None)
    parts = control.gather_to_zero(own) or []
    return sorted((t for part in parts for t in part), key=lambda t: (t.group, t.index))


def analyse(trajectories: Sequence[Trajectory], normalize: Literal["mean", "std"]) -> list[Trajectory]:
    """Fill in advantages and conflict runs, group by group."""
    groups = torch.tensor([t.group for t in trajectories])
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
    advantages = group_advantages(rewards, groups, normalize=normalize)
    lengths = torch.tensor([t.length for t in trajectories])
    tokens = torch.zeros(len(trajectories), int(lengths.max()), dtype=torch.int64)
    for row, trajectory in zip(tokens, trajectories, strict=True):
        row[: trajectory.length] = torch.from_numpy(trajectory.token_ids)
    prefix, suffix = conflict_runs(tokens, lengths, advantages, groups)
    return [
        replace(t, advantage=a, prefix=p, suffix=s)
        for t, a, p, s in zip(
            trajectories, advantages.tolist(), prefix.tolist(), suffix.tolist(), strict=True
        )
    ]


def without_signal(trajectories: Sequence[Trajectory]) -> set[int]:
    """Groups whose rewards are all equal but for rounding: those whose advantages are all 0."""
    if not trajectories:
        return set()
    groups = torch.tensor([t.group for t in trajectories])
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
    some = group_advantages(rewards, groups).ne(0)
    return set(groups.tolist()) - set(groups[some].tolist())


def cut(trajectory: Trajectory, length: int) -> Trajectory:
    """The trajectory with no more than its first `length` completion tokens."""
    if trajectory.length <= length:
        return trajectory
    arrays = {
        name: getattr(trajectory, name)[:length] for name in ("token_ids", "logprobs", "token_versions")
    }
    return replace(trajectory, finish_reason="length", **arrays)


def solutions(
    prompts: Sequence[GroupPrompt], tokenizer: PreTrainedTokenizerBase, step: int
) -> list[Trajectory]:
    """The data set's own solutions as trajectories, for supervised fine-tuning."""
    batch = []
    for place in prompts:
        target = np.asarray(solution_ids(place.prompt, tokenizer), np.int32)
        batch.append(
            Trajectory(
                step=step,
                group=place.group,
                index=0,
                prompt_id=place.prompt.id,
                prompt_ids=np.asarray(place.prompt.prompt_ids, np.int32),
                token_ids=target,
                logprobs=np.zeros(len(target), np.float32),
                token_versions=np.full(len(target), -1, np.int32),
                finish_reason="data",
                text=tokenizer.decode(target, skip_special_tokens=True),
                answer=place.prompt.answer,
                advantage=1.0,
            )
        )
    return batch
