"""What one rank does in the tests of Transformer Engine's layers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.config import RunConfig
from tests.parallel.pool import forget_model
from tests.policy import training

LAYERS = ("TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention")


def run_config(
    directory: Path, checkpoint: Path, layers: str = "transformer_engine", **sections: Any
) -> RunConfig:
    """A run with the given layers; sections are given as dictionaries."""
    model = {"layers": layers} | sections.pop("model", {})
    defaults = {"training": {"micro_batch_tokens": 128}}
    return training.run_config(directory, checkpoint, model=model, **defaults | sections)


def each(job: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `job` returns for each case's arguments, one after the other on the same ranks."""
    found = []
    for arguments in cases:
        found.append(job(*arguments))
        forget_model()
    return found


def logprobs(config: RunConfig) -> tuple[set[str], list[np.ndarray], dict[str, np.ndarray]]:
    """Kinds of modules in the policy, the logprobs of a batch, and the exported weights."""
    from gtpo_megatron.policy.step import token_logprobs

    policy, _, _ = training.start(config)
    kinds = {type(module).__name__ for chunk in policy.chunks for module in chunk.modules()}
    batch = training.batch(0)
    found = token_logprobs(
        policy, batch, config.parallel, config.training.micro_batch_tokens, temperature=1.0
    )
    return kinds, found, training.weights(policy)


def train(config: RunConfig, count: int) -> tuple[list[tuple[float, ...]], str, dict[str, np.ndarray]]:
    """(loss, gradient norm, learning rate) of each step on one batch, Adam's class, and the weights after them."""
    from gtpo_megatron.policy.checkpoint.state import _adams

    policy, optimizer, _ = training.start(config)
    adam = type(_adams(optimizer)[0])
    done = training.steps(config, policy, optimizer, [0] * count)  # one batch, so that the loss falls
    return done, f"{adam.__module__}.{adam.__name__}", training.weights(policy)


def loaded_scales(config: RunConfig) -> dict[str, np.ndarray]:
    """What delayed scaling knows on this rank after the newest checkpoint was loaded, before any pass."""
    from gtpo_megatron.policy.checkpoint.scales import scaling_state

    policy, _, checkpointer = training.start(config)
    assert checkpointer.load_latest() is not None
    return {name: value.numpy() for name, value in scaling_state(policy).items()}


def main_weights(config: RunConfig) -> dict[str, np.ndarray]:
    """What the distributed optimizer starts from: its fp32 weights on this rank, by their names in the model."""
    policy, _, _ = training.start(config)
    return {
        name: parameter.main_param.detach().numpy().copy()
        for chunk in policy.chunks
        for name, parameter in chunk.named_parameters()
        if getattr(parameter, "main_param", None) is not None
    }
