"""Steps of one policy in one number format: what benchmarks/gpu.py compares, each format in a process of its own."""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.config import (
    AlgorithmConfig,
    GateConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from gtpo_megatron.trajectories.record import Trajectory

VARIANTS: dict[str, dict[str, Any]] = {
    "local-bf16": {"layers": "local"},
    "bf16": {"layers": "transformer_engine"},
    "fp8-tensorwise": {"fp8": {"format": "hybrid"}},
    "fp8-tensorwise-edges-bf16": {"fp8": {"format": "hybrid", "first_last_bf16": True}},
    "fp8-tensorwise-weights": {"fp8": {"format": "hybrid", "param": True}},
    "fp8-blockwise": {"fp8": {"format": "e4m3", "recipe": "blockwise"}},
    "fp8-delayed": {"fp8": {"format": "hybrid", "recipe": "delayed"}},
}
"""`model` sections beside path and dtype."""
BASELINE = "local-bf16"


@dataclass(frozen=True)
class Work:
    """A batch of made-up completions, and how often it is trained on."""

    groups: int = 4
    group_size: int = 4
    completion: int = 1024  # tokens of the longest
    micro_batch_tokens: int = 8192
    steps: int = 6


@dataclass(frozen=True)
class Measured:
    """One number format."""

    variant: str
    layers: str  # class of a layer's first product
    adam: str
    losses: list[float]
    grad_norms: list[float]
    seconds_per_step: float  # median without the first, which compiles and allocates
    peak_gib: float
    logprobs: list[float] = field(repr=False)  # of every token of the batch, before the first step


def batch(work: Work, vocabulary: int) -> list[Trajectory]:
    """Random completions with conflict tokens at both ends; the same for every format."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(work.groups):
        prompt, prefix, suffix = (rng.integers(3, vocabulary, n).astype(np.int32) for n in (32, 3, 2))
        rewards = rng.permutation(work.group_size) / work.group_size
        for index in range(work.group_size):
            middle = rng.integers(3, vocabulary, int(rng.integers(work.completion // 2, work.completion - 5)))
            tokens = np.concatenate([prefix, middle.astype(np.int32), suffix])
            made.append(
                Trajectory(
                    step=0,
                    group=group,
                    index=index,
                    prompt_id=str(group),
                    prompt_ids=prompt,
                    token_ids=tokens,
                    logprobs=np.zeros(len(tokens), np.float32),
                    token_versions=np.zeros(len(tokens), np.int32),
                    finish_reason="stop",
                    reward=float(rewards[index]),
                    advantage=float(rewards[index] - rewards.mean()),
                    prefix=3,
                    suffix=2,
                )
            )
    return made


def measure(
    variant: str, model: Path, work: Work, trajectories: Sequence[Trajectory] | None = None
) -> Measured:
    """Steps of GTPO on one batch (a made-up one by default) by a policy of `model` on this rank alone."""
    from gtpo_megatron.policy import platform
    from gtpo_megatron.policy.model import build_policy, initialize_parallel, unwrap
    from gtpo_megatron.policy.optimizer import apply_update, build_optimizer
    from gtpo_megatron.policy.step import batch_objective, forward_backward, pack, token_logprobs
    from gtpo_megatron.trajectories.shares import BatchTable

    parallel, budget = ParallelConfig(), work.micro_batch_tokens
    platform.init_process_group()
    initialize_parallel(parallel, seed=0)
    training = TrainingConfig(steps=work.steps, micro_batch_tokens=budget)
    section = ModelConfig(path=str(model), dtype="bf16", **VARIANTS[variant])
    policy = build_policy(section, parallel, training)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-5, warmup_steps=0), policy, work.steps)
    trajectories = trajectories or batch(work, policy.vocab_size)
    logprobs = np.concatenate(token_logprobs(policy, trajectories, parallel, budget, temperature=1.0))
    algorithm = AlgorithmConfig(gate=GateConfig(mode="off"))
    objective = batch_objective(algorithm, BatchTable.of(trajectories), initial_entropy=1.0)
    micro_batches = pack(policy, trajectories, parallel, budget)
    losses, norms, seconds = [], [], []
    for _ in range(work.steps):
        platform.synchronize()
        start = time.perf_counter()
        loss = forward_backward(policy, micro_batches, objective, len(trajectories)).loss
        update = apply_update(optimizer, policy, loss)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        norms.append(update.grad_norm)
    chained = getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron])
    adam = type(next(part.optimizer for part in chained if part.optimizer is not None))
    first = unwrap(policy.chunks[0]).decoder.layers[0].self_attention.linear_qkv
    return Measured(
        variant=variant,
        layers=type(first).__name__,
        adam=f"{adam.__module__}.{adam.__name__}",
        losses=losses,
        grad_norms=norms,
        seconds_per_step=statistics.median(seconds[1:]),
        peak_gib=platform.peak_memory_gib(),
        logprobs=logprobs.tolist(),
    )


def gap(found: list[float], baseline: list[float]) -> dict[str, float]:
    """Nats per token between two formats of the same weights: absolute mean, 99th percentile, largest; signed mean."""
    delta = np.asarray(found) - np.asarray(baseline)
    size = np.abs(delta)
    return {
        "mean_abs": float(size.mean()),
        "p99_abs": float(np.quantile(size, 0.99)),
        "max_abs": float(size.max()),
        "mean": float(delta.mean()),
    }


def main() -> None:
    """Write what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=json.loads, default={})
    arguments = parser.parse_args()
    measured = measure(arguments.variant, arguments.model, Work(**arguments.work))
    arguments.output.write_text(json.dumps(asdict(measured)), "utf-8")


if __name__ == "__main__":
    main()
