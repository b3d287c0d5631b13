"""Accuracy and format on held-out prompts, by the engine that training samples with."""

import threading
from collections.abc import Sequence

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gtpo_megatron.config import RewardTerm, RunConfig
from gtpo_megatron.data.prompts import Prompt, load_prompts, stop_token_ids
from gtpo_megatron.evaluation.passk import any_right, maj_at_k
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.collective import on_rank_zero
from gtpo_megatron.policy.model import DTYPES, world_rank
from gtpo_megatron.rewards.pool import RewardPool
from gtpo_megatron.rollout.collect import GroupPrompt, gather, group_seed, sample_share
from gtpo_megatron.rollout.embedded import EmbeddedEngine
from gtpo_megatron.rollout.protocol import RolloutEngine, SamplingParams
from gtpo_megatron.trajectories.record import Trajectory

TERMS = (RewardTerm(kind="math_verify", name="accuracy"), RewardTerm(kind="format", name="format"))


def evaluate_prompts(
    config: RunConfig,
    engine: RolloutEngine | None,
    lock: threading.Lock,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    step: int,
) -> list[Trajectory]:
    """Sample the prompts with the engine's weights and score them, whatever the training reward is. Collective.

    The completions are on rank 0; there are none elsewhere. One completion a prompt is greedy; more are sampled at the training temperature. `engine` is None on ranks without one.
    """
    samples = config.evaluation.samples
    params = SamplingParams(
        n=samples,
        max_new_tokens=config.evaluation.max_new_tokens or config.rollout.max_new_tokens,
        temperature=0.0 if samples == 1 else config.rollout.temperature,
        stop_token_ids=stop_token_ids(tokenizer),
    )
    # other seeds than training has
    seed = config.training.seed + 1
    places = [GroupPrompt(g, prompt, group_seed(seed, step, g), g) for g, prompt in enumerate(prompts)]
    if engine is None:
        return gather([])
    own = places[world_rank() :: dist.get_world_size()] if engine.on_every_rank else places
    scoring = config.rewards.model_copy(update={"terms": TERMS, "max_failed_share": 1.0})
    try:
        with RewardPool(scoring) as rewards, lock:
            share = sample_share(engine, rewards, tokenizer, own, params, step)
    except Exception as error:  # told to all ranks
        return gather(error)
    return gather(share)


def evaluate_checkpoint(config: RunConfig) -> dict[str, float]:
    """The figures of the Hugging Face checkpoint model.path on evaluation.data, by the embedded engine. Collective."""
    platform.init_process_group()
    path = config.model.path
    tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer or path)
    prompts = load_prompts(config.evaluation.data, tokenizer).prompts
    dtype = DTYPES[config.model.dtype]
    engine = EmbeddedEngine(path, dtype, platform.device(), config.rollout.batch_size, tokenizer.pad_token_id)
    engine.update_weights(
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict().items(), version=0
    )
    sampled = evaluate_prompts(config, engine, threading.Lock(), tokenizer, prompts, step=0)
    return on_rank_zero(lambda: figures(sampled))


def figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean accuracy, format share, length and truncation; with several samples also pass@k and maj@k."""
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
    return result
