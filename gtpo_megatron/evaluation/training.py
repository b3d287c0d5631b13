"""Accuracy and format on held-out prompts, by the engine that training samples with."""

from collections.abc import Sequence

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gtpo_megatron.config import RewardConfig, RewardTerm, RunConfig
from gtpo_megatron.data.prompts import Prompt, stop_token_ids
from gtpo_megatron.data.suites import DATA, metrics_of
from gtpo_megatron.evaluation.passk import any_right, maj_at_k
from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.rewards.pool import RewardPool
from gtpo_megatron.rollout.collect import GroupPrompt, gather, group_seed, sample_share
from gtpo_megatron.rollout.protocol import RolloutEngine, SamplingParams
from gtpo_megatron.trajectories.record import Trajectory

TERMS = (RewardTerm(kind="math_verify", name="accuracy"), RewardTerm(kind="format", name="format"))


def evaluate_prompts(
    config: RunConfig,
    engine: RolloutEngine | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    step: int,
) -> list[Trajectory]:
    """Sample the prompts with the engine's weights and score them, whatever the training reward is. Collective.

    `config` is the suite's (`data.suites.Suite`), whose section `evaluation` says how its prompts are sampled.
    The completions are on rank 0; there are none elsewhere. `engine` is None on ranks without one;
    where there is one, it is this evaluation's turn to use it.
    """
    params = sampling_params(config, stop_token_ids(tokenizer))
    seed = sampling_seed(config)
    places = [GroupPrompt(g, prompt, group_seed(seed, step, g), g) for g, prompt in enumerate(prompts)]
    if engine is None:
        return gather([])
    own = places[world_rank() :: dist.get_world_size()] if engine.on_every_rank else places
    try:
        with RewardPool(scoring(config)) as rewards:
            share = sample_share(engine, rewards, tokenizer, own, params, step)
    except Exception as error:  # told to all ranks
        return gather(error)
    return gather(share)


def sampling_params(config: RunConfig, stops: tuple[int, ...] = ()) -> SamplingParams:
    """How an evaluation samples: one completion a prompt is greedy, more are at the training temperature, by default."""
    evaluation, rollout = config.evaluation, config.rollout
    temperature = evaluation.temperature
    if temperature is None:
        temperature = 0.0 if evaluation.samples == 1 else rollout.temperature
    return SamplingParams(
        n=evaluation.samples,
        max_new_tokens=evaluation.max_new_tokens or rollout.max_new_tokens,
        temperature=temperature,
        top_p=evaluation.top_p,
        stop_token_ids=stops,
    )


def sampling_seed(config: RunConfig) -> int:
    """Of an evaluation's samples: by default another one than training has."""
    seed = config.evaluation.seed
    return config.training.seed + 1 if seed is None else seed


def scoring(config: RunConfig) -> RewardConfig:
    """Terms of an evaluation, whatever the training reward is, with the limits of training's."""
    return config.rewards.model_copy(update={"terms": TERMS, "max_failed_share": 1.0})


def figures(trajectories: Sequence[Trajectory], suite: str = DATA) -> dict[str, float]:
    """Mean accuracy, format share, length and truncation; with several samples also pass@k and maj@k.

    The metrics are called eval/..., those of a suite other than evaluation.data eval/<suite>/...
    """
    count, groups = len(trajectories), len({t.group for t in trajectories})
    samples = count // groups
    result = {
        "eval/accuracy": sum(t.reward_terms["accuracy"] for t in trajectories) / count,
        "eval/format": sum(t.reward_terms["format"] for t in trajectories) / count,
        "eval/length_mean": sum(t.length for t in trajectories) / count,
        "eval/truncated": sum(t.finish_reason == "length" for t in trajectories) / count,
        "eval/prompts": float(groups),
    }
    if samples > 1:
        result[f"eval/pass@{samples}"] = any_right(trajectories)
        result[f"eval/maj@{samples}"] = maj_at_k(trajectories)
    return {
        f"{metrics_of(suite)}{name.removeprefix(metrics_of(DATA))}": value for name, value in result.items()
    }
