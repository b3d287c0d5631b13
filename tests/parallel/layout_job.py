"""What one rank does in a layout test: build, one GTPO step, and hand back the loss, gradients and updated weights."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from gtpo_megatron.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.trajectories.record import Trajectory

VOCABULARY = 300
LEARNING_RATE = 0.1


def sample_batch(groups: int = 4, group_size: int = 4, seed: int = 0) -> list[Trajectory]:
    """Completions of different lengths with shared prefixes and suffixes, and all kinds of advantage."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, VOCABULARY, n).astype(np.int32)  # noqa: E731
    batch = []
    for group in range(groups):
        prompt, prefix, suffix = ids(4 + 3 * group), ids(3), ids(2)
        rewards = rng.permutation(np.arange(group_size) % 3).astype(float)
        for index in range(group_size):
            tokens = np.concatenate([prefix, ids(int(rng.integers(2, 20))), suffix])
            batch.append(
                Trajectory(
                    step=0,
                    group=group,
                    index=index,
                    prompt_id=str(group),
                    prompt_ids=prompt,
                    token_ids=tokens,
                    logprobs=-rng.random(len(tokens)).astype(np.float32),
                    token_versions=np.zeros(len(tokens), np.int32),
                    finish_reason="stop",
                    reward=rewards[index],
                    advantage=rewards[index] - rewards.mean(),
                    prefix=3,
                    suffix=2,
                )
            )
    return [replace(t, prefix=0, suffix=0) if t.advantage == 0 else t for t in batch]


def run_layout(
    checkpoint: Path,
    parallel: ParallelConfig,
    training: TrainingConfig,
    algorithm: AlgorithmConfig,
    distributed_optimizer: bool = False,
    float64: bool = False,
    layers: Literal["auto", "local", "transformer_engine"] = "auto",
) -> dict[str, Any]:
    """Loss, gradients and updated weights by Hugging Face name (rank 0 alone returns the tensors).

    In float64, for which Megatron has no optimizer, the weights are not updated.
    """
    with fp32_in(float64):
        return _run_layout(checkpoint, parallel, training, algorithm, distributed_optimizer, float64, layers)


def fp32_in(float64: bool) -> AbstractContextManager[object]:
    """Inside, a policy of dtype fp32 is one of float64. Not after: the process runs other tests' jobs as well."""
    import torch

    from gtpo_megatron.policy import model

    return patch.dict(model.DTYPES, fp32=torch.float64 if float64 else torch.float32)


def fp32_is() -> str:
    """What a policy of dtype fp32 would be made of in this process."""
    from gtpo_megatron.policy import model

    return str(model.DTYPES["fp32"])


def _run_layout(
    checkpoint: Path,
    parallel: ParallelConfig,
    training: TrainingConfig,
    algorithm: AlgorithmConfig,
    distributed_optimizer: bool,
    float64: bool,
    layers: Literal["auto", "transformer_engine"],
) -> dict[str, Any]:
    from megatron.core import parallel_state

    from gtpo_megatron.policy import platform
    from gtpo_megatron.policy.model import build_policy, export_hf_weights, initialize_parallel, world_rank
    from gtpo_megatron.policy.objective import BatchConstants, make_objective
    from gtpo_megatron.policy.optimizer import apply_update, build_optimizer
    from gtpo_megatron.policy.seen import TokenWatch
    from gtpo_megatron.policy.step import deal, forward_backward, score

    initialize_parallel(parallel, seed=0)
    policy = build_policy(
        ModelConfig(path=str(checkpoint), dtype="fp32", layers=layers),
        parallel,
        training,
        distributed_optimizer=distributed_optimizer,
    )
    batch = sample_batch()
    table, micro_batches = deal(
        policy, batch if world_rank() == 0 else [], parallel, training.micro_batch_tokens
    )
    entropy = score(policy, micro_batches, len(batch)).completions["entropy"]
    constants = BatchConstants.of(table, algorithm, platform.device())
    group = parallel_state.get_context_parallel_group()
    objective = make_objective(algorithm, constants, float(entropy.mean()), group)
    watch = TokenWatch("entropies")
    result = forward_backward(policy, micro_batches, watch.on(objective), len(batch))
    tokens = watch.gather(table)
    gradients = None if distributed_optimizer else _gradients(policy)
    grad_norm, weights = None, None
    if not float64:
        # with a large epsilon the update is smooth in the gradient, as a comparison of weights needs
        config = OptimizerConfig(lr=LEARNING_RATE, eps=1.0, distributed=distributed_optimizer)
        grad_norm = apply_update(build_optimizer(config, policy, steps=10), policy, result.loss).grad_norm
        weights = {name: tensor.numpy().copy() for name, tensor in export_hf_weights(policy)}
    first = world_rank() == 0
    return {
        "loss": result.loss,
        "entropy": entropy,
        "completions": result.completions,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "micro_batches": len(micro_batches),
        "gradients": gradients if first else None,
        "weights": weights if first else None,
    }


def _gradients(policy: Any) -> dict[str, np.ndarray]:
    """Whole gradients by Hugging Face name: the export, fed with gradients in the parameters' place."""
    from gtpo_megatron.policy.model import export_hf_weights

    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    kept = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype).clone()
    gradients = {name: tensor.numpy().copy() for name, tensor in export_hf_weights(policy)}
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return gradients
