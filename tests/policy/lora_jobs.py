"""What one rank does in the tests of LoRA: passes, updates, checkpoints and exports of a tiny policy with adapters."""

from typing import Any

import numpy as np
import torch

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform

platform.install()

from gtpo_megatron.policy.adapters import adapter_weights, is_adapter  # noqa: E402
from gtpo_megatron.policy.batch import MicroBatch  # noqa: E402
from gtpo_megatron.policy.checkpoint.state import materialize  # noqa: E402
from gtpo_megatron.policy.exchange.adapter import export_adapter  # noqa: E402
from gtpo_megatron.policy.exchange.export import export_hf_checkpoint  # noqa: E402
from gtpo_megatron.policy.head import TokenStatistics  # noqa: E402
from gtpo_megatron.policy.model import Policy, build_policy, initialize_parallel  # noqa: E402
from gtpo_megatron.policy.objective import Objective, Report  # noqa: E402
from gtpo_megatron.policy.optimizer import build_optimizer  # noqa: E402
from gtpo_megatron.policy.step import forward_backward, pack, token_logprobs  # noqa: E402
from tests.parallel.layout_job import fp32_in  # noqa: E402
from tests.policy.training import batch, checkpointer, start, state, steps  # noqa: E402

TEMPERATURE = 0.7


def negative_logprob(micro_batch: MicroBatch, statistics: TokenStatistics) -> tuple[torch.Tensor, Report]:
    """Minus the sum of logprobs of the completions that `batch` makes."""
    return -statistics.logprobs.sum(), Report()


def own_adapters(policy: Policy) -> dict[str, np.ndarray]:
    """Whole adapters by PEFT's name. Collective."""
    return {n: t.double().numpy().copy() for n, t in adapter_weights(policy.bridge, policy.modules)}


def passes(config: RunConfig, float64: bool = False) -> dict[str, Any]:
    """Logprobs with and without adapters, and a pass's loss and adapter gradients."""
    with fp32_in(float64):
        initialize_parallel(config.parallel, config.training.seed)
        policy = build_policy(config.model, config.parallel, config.training)
        return _passes(config, policy)


def _passes(config: RunConfig, policy: Policy) -> dict[str, Any]:
    budget = config.training.micro_batch_tokens

    def logprobs() -> list[np.ndarray]:
        return token_logprobs(policy, batch(0), config.parallel, budget, temperature=TEMPERATURE)

    whole = logprobs()
    with policy.without_adapters():
        base = logprobs()
    again = logprobs()
    micro_batches = pack(policy, batch(0), config.parallel, budget)
    passed = forward_backward(
        policy, micro_batches, Objective(negative_logprob), len(batch(0)), temperature=TEMPERATURE
    )
    trained = [p for chunk in policy.chunks for p in chunk.parameters() if p.requires_grad]
    kept = [p.data for p in trained]
    start_weights = own_adapters(policy)
    for parameter in trained:
        parameter.data = parameter.main_grad.to(parameter.dtype).clone()
    gradients = own_adapters(policy)
    for parameter, data in zip(trained, kept, strict=True):
        parameter.data = data
    return {
        "logprobs": whole,
        "base": base,
        "again": again,
        "loss": passed.loss,
        "adapters": start_weights,
        "gradients": gradients,
    }


def train_and_export(config: RunConfig, count: int) -> dict[str, Any]:
    """Train some steps, and write what the end of a run writes; the figures of the steps."""
    policy, optimizer, _ = start(config)
    done = steps(config, policy, optimizer, range(count))
    export_hf_checkpoint(policy, config.model.path, config.path / "hf", config.model.dtype)
    export_adapter(policy, config.model, config.path / "adapter")
    budget = config.training.micro_batch_tokens
    logprobs = token_logprobs(policy, batch(0), config.parallel, budget, temperature=TEMPERATURE)
    return {"steps": done, "logprobs": logprobs, "adapters": own_adapters(policy)}


def train_and_save(config: RunConfig, before: int, after: int) -> dict[str, Any]:
    """Train, save, train on; the figures and adapters after the save and at the end."""
    policy, optimizer, saver = start(config)
    steps(config, policy, optimizer, range(before))
    saver.save(state(before))
    saver.finish()
    saved = own_adapters(policy)
    done = steps(config, policy, optimizer, range(before, before + after))
    return {"saved": saved, "steps": done, "adapters": own_adapters(policy)}


def resume(config: RunConfig, before: int, after: int) -> dict[str, Any]:
    """What `train_and_save` returns, of a run that goes on from its checkpoint, in this configuration's layout."""
    policy, optimizer, saver = start(config)
    assert saver.load_latest() == state(before)
    saved = own_adapters(policy)
    done = steps(config, policy, optimizer, range(before, before + after))
    return {"saved": saved, "steps": done, "adapters": own_adapters(policy)}


def resume_error(config: RunConfig) -> str:
    """The message of a resume that must fail."""
    policy, optimizer, _ = start(config)
    try:
        checkpointer(config, policy, optimizer).load_latest()
    except UserError as error:
        return str(error)
    return ""


def build_error(config: RunConfig) -> str:
    """The message of a policy that must not be built."""
    initialize_parallel(config.parallel, config.training.seed)
    try:
        build_policy(config.model, config.parallel, config.training)
    except UserError as error:
        return str(error)
    return ""


def kept_bytes(config: RunConfig, trained: bool) -> dict[str, int]:
    """Bytes of parameters, adapters' apart, of gradient buffers, and (of a trained policy) of Adam's moments."""
    initialize_parallel(config.parallel, config.training.seed)
    policy = build_policy(config.model, config.parallel, config.training, trained=trained)
    named = [item for chunk in policy.chunks for item in chunk.named_parameters()]
    buffers = [p.main_grad.untyped_storage() for _, p in named if hasattr(p, "main_grad")]
    found = {
        "adapters": sum(p.nbytes for name, p in named if is_adapter(name)),
        "base": sum(p.nbytes for name, p in named if not is_adapter(name)),
        "gradients": sum({s.data_ptr(): s.nbytes() for s in buffers}.values()),
    }
    if trained:
        optimizer = build_optimizer(config.optimizer, policy, config.training.steps)
        materialize(optimizer)
        states = optimizer.megatron.optimizer.state.values()
        found["moments"] = sum(t.nbytes for entry in states for t in entry.values() if t.dim())
    return found
