"""A few plain training steps on gloo ranks, with checkpoints: what the checkpoint tests run in the rank pool."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gtpo_megatron.config import RunConfig
from gtpo_megatron.policy import platform

platform.install()

from gtpo_megatron.policy.batch import MicroBatch  # noqa: E402
from gtpo_megatron.policy.checkpoint.checkpointer import Checkpointer, TrainState  # noqa: E402
from gtpo_megatron.policy.head import TokenStatistics  # noqa: E402
from gtpo_megatron.policy.model import Policy, build_policy, export_hf_weights, initialize_parallel  # noqa: E402
from gtpo_megatron.policy.objective import Objective, Report  # noqa: E402
from gtpo_megatron.policy.optimizer import Optimizer, apply_update, build_optimizer  # noqa: E402
from gtpo_megatron.policy.step import forward_backward, pack  # noqa: E402
from gtpo_megatron.trajectories.record import Trajectory  # noqa: E402

# for tests whose parameters are a family of models, a number of ranks and a layout: tied embeddings over stages, and experts
DENSE_AND_EXPERTS = pytest.mark.parametrize(
    ("family", "world", "parallel"),
    [("qwen2_tied", 4, {"tensor": 2, "pipeline": 2}), ("qwen3_moe", 2, {"expert": 2})],
    ids=["tied-tp2-pp2", "experts-ep2"],
)


def run_config(directory: Path, checkpoint_path: Path, **sections: Any) -> RunConfig:
    """A configuration of a run in `directory`; sections are given as dictionaries."""
    defaults = {
        "name": "run",
        "dir": str(directory),
        "model": {"path": str(checkpoint_path), "dtype": "fp32"},
        "data": {"path": "unused.jsonl"},
        "training": {"steps": 10, "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    }
    merged = {key: {**defaults.get(key, {}), **value} for key, value in sections.items()}
    return RunConfig.model_validate(defaults | merged)


def batch(step: int, size: int = 8) -> list[Trajectory]:
    """Completions of random tokens, the same on every rank."""
    generator = np.random.default_rng(step)
    return [
        Trajectory(
            step=step,
            group=i,
            index=0,
            prompt_id=str(i),
            prompt_ids=generator.integers(3, 320, 5).astype(np.int32),
            token_ids=generator.integers(3, 320, 4 + i).astype(np.int32),
            logprobs=np.zeros(4 + i, np.float32),
            token_versions=np.zeros(4 + i, np.int32),
            finish_reason="stop",
        )
        for i in range(size)
    ]


def negative_logprob(micro_batch: MicroBatch, statistics: TokenStatistics) -> tuple[torch.Tensor, Report]:
    """Minus the sum of logprobs, over 40."""
    return -statistics.logprobs.sum() / 40, Report()


def start(config: RunConfig) -> tuple[Policy, Optimizer, Checkpointer]:
    """Policy, optimizer and checkpoints of a run, as training starts."""
    initialize_parallel(config.parallel, config.training.seed)
    policy = build_policy(
        config.model, config.parallel, config.training, distributed_optimizer=config.optimizer.distributed
    )
    optimizer = build_optimizer(config.optimizer, policy, config.training.steps)
    return policy, optimizer, checkpointer(config, policy, optimizer)


def checkpointer(config: RunConfig, policy: Policy, optimizer: Optimizer) -> Checkpointer:
    """The checkpoints of a run."""
    return Checkpointer(config.path / "checkpoints", config, policy, optimizer, config.model.path)


def steps(
    config: RunConfig, policy: Policy, optimizer: Optimizer, numbers: Iterable[int]
) -> list[tuple[float, ...]]:
    """Train on the numbered batches; (loss, gradient norm, learning rate) of each."""
    done = []
    for number in numbers:
        micro_batches = pack(policy, batch(number), config.parallel, config.training.micro_batch_tokens)
        loss = forward_backward(policy, micro_batches, Objective(negative_logprob), 8).loss
        update = apply_update(optimizer, policy, loss)
        done.append((loss, update.grad_norm, update.learning_rate))
    return done


def state(step: int) -> TrainState:
    """A state after `step` steps."""
    return TrainState(step=step, weight_version=step, initial_entropy=1.25, sampler={"position": 8 * step})


def weights(policy: Policy) -> dict[str, np.ndarray]:
    """All parameters under their Hugging Face names."""
    return {name: tensor.float().numpy().copy() for name, tensor in export_hf_weights(policy)}
