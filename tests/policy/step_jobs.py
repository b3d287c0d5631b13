"""What one rank does in the tests of a step: passes, updates and their effects on a tiny policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gtpo_megatron.config import (
    AlgorithmConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable
from tests.parallel.layout_job import _gradients as gradients
from tests.parallel.layout_job import sample_batch

SMALL, LARGE = 64, 4096  # tokens of a micro-batch: several for a batch, and one


def start(
    checkpoint: Path,
    algorithm: AlgorithmConfig,
    reference: Path | None = None,
    budget: int = SMALL,
    temperature: float = 1.0,
) -> Any:
    """As much of a run as `train_on` needs."""
    from gtpo_megatron.policy.model import build_policy, initialize_parallel
    from gtpo_megatron.policy.optimizer import build_optimizer

    initialize_parallel(ParallelConfig(), seed=0)
    training = TrainingConfig(steps=10, micro_batch_tokens=budget)

    def build(path: Path, trained: bool) -> Any:
        return build_policy(
            ModelConfig(path=str(path), dtype="fp32"), ParallelConfig(), training, trained=trained
        )

    policy = build(checkpoint, trained=True)
    return SimpleNamespace(
        config=SimpleNamespace(
            algorithm=algorithm,
            rollout=RolloutConfig(temperature=temperature),
            parallel=ParallelConfig(),
            training=training,
            logging=LoggingConfig(),
        ),
        stage=lambda name: nullcontext(),
        initial_entropy=None,
        version=0,
        policy=policy,
        reference=build(reference, trained=False) if reference else None,
        # with a large epsilon the update is smooth in the gradient, as a comparison of micro-batches needs
        optimizer=build_optimizer(OptimizerConfig(lr=0.1, eps=1.0), policy, steps=10),
    )


@contextmanager
def counted_passes(policy: Any) -> Iterator[dict[str, int]]:
    """Forward and backward passes of a policy's GPTModel, counted while the context is open."""
    from gtpo_megatron.policy.model import unwrap

    counts = {"forward": 0, "backward": 0}

    def count(name: str) -> None:
        counts[name] += 1

    model = unwrap(policy.chunks[0])
    hooks = [
        model.register_forward_pre_hook(lambda *_: count("forward")),
        model.decoder.final_layernorm.register_full_backward_pre_hook(lambda *_: count("backward")),
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def passes_of_steps(
    checkpoint: Path, algorithm: AlgorithmConfig, reference: Path | None
) -> tuple[int, list[dict[str, int]], int]:
    """Micro-batches of the batch, the passes of each of two steps, and the reference policy's forward passes in both."""
    from gtpo_megatron.policy.step import pack
    from gtpo_megatron.train import dealt, train_on

    run, batch = start(checkpoint, algorithm, reference), sample_batch()
    steps, of_reference = [], {"forward": 0}
    for _ in range(2):
        with counted_passes(run.policy) as counts:
            if run.reference is None:
                train_on(run, *dealt(run, batch))
            else:
                with counted_passes(run.reference) as reference_counts:
                    train_on(run, *dealt(run, batch))
                of_reference["forward"] += reference_counts["forward"]
        steps.append(counts)
    return len(pack(run.policy, batch, ParallelConfig(), SMALL)), steps, of_reference["forward"]


def loss_and_gradients(
    checkpoint: Path,
    reference: Path,
    batch: Sequence[Trajectory],
    algorithm: AlgorithmConfig,
    initial_entropy: float,
    temperature: float,
) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """The first update's loss, gradients by Hugging Face name, and sums."""
    from gtpo_megatron import train

    run = start(checkpoint, algorithm, reference if algorithm.kl_beta else None, temperature=temperature)
    run.initial_entropy = initial_entropy
    kept = []
    apply_update = train.apply_update

    def keep(optimizer: Any, policy: Any, loss: float) -> Any:
        kept.append(gradients(policy))
        return apply_update(optimizer, policy, loss)

    train.apply_update = keep
    try:
        passed, _ = train.train_on(run, *train.dealt(run, batch))
    finally:
        train.apply_update = apply_update
    return passed.loss, kept[0], passed.sums


def second_step(checkpoint: Path, budget: int) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """After one update, the gradient of another batch: this policy's, and that of a new one with its weights."""
    from gtpo_megatron.policy.model import build_policy
    from gtpo_megatron.policy.step import batch_objective, forward_backward, pack
    from gtpo_megatron.train import dealt, train_on

    algorithm = AlgorithmConfig()
    run = start(checkpoint, algorithm, budget=budget)
    train_on(run, *dealt(run, sample_batch(seed=0)))
    fresh = build_policy(
        ModelConfig(path=str(checkpoint), dtype="fp32"), ParallelConfig(), run.config.training
    )
    with torch.no_grad():
        for ours, theirs in zip(fresh.chunks[0].parameters(), run.policy.chunks[0].parameters(), strict=True):
            ours.copy_(theirs)
    batch = sample_batch(seed=1)
    micro_batches = pack(run.policy, batch, ParallelConfig(), budget)
    objective = batch_objective(algorithm, BatchTable.of(batch), initial_entropy=1.0)
    found = []
    for policy in (run.policy, fresh):
        forward_backward(policy, micro_batches, objective, len(batch))
        found.append(gradients(policy))
    return len(micro_batches), *found


def padded_passes(
    checkpoint: Path, alignments: Sequence[int]
) -> list[tuple[int, float, dict[str, np.ndarray]]]:
    """(tokens, loss, gradients by Hugging Face name) of a batch and an empty row, sequences padded to each alignment."""
    from gtpo_megatron.policy.batch import make_micro_batch
    from gtpo_megatron.policy.step import batch_objective, forward_backward, pack

    run, batch = start(checkpoint, AlgorithmConfig()), sample_batch()
    objective = batch_objective(run.config.algorithm, BatchTable.of(batch), initial_entropy=1.0)
    found = []
    for alignment in alignments:
        policy = replace(run.policy, alignment=alignment)
        micro_batches = [
            *pack(policy, batch, ParallelConfig(), LARGE),
            make_micro_batch(batch, [], alignment=alignment),
        ]
        passed = forward_backward(policy, micro_batches, objective, len(batch))
        found.append((sum(b.tokens.numel() for b in micro_batches), passed.loss, gradients(policy)))
    return found


def bad_updates(checkpoint: Path) -> list[dict[str, Any]]:
    """A good update, two that are not finite (the loss; a gradient alone), and a good one: what each did."""
    from gtpo_megatron.policy.model import export_hf_weights
    from gtpo_megatron.policy.optimizer import apply_update
    from gtpo_megatron.policy.step import batch_objective, forward_backward, pack

    run, batch = start(checkpoint, AlgorithmConfig()), sample_batch()
    micro_batches = pack(run.policy, batch, ParallelConfig(), SMALL)
    good = batch_objective(run.config.algorithm, BatchTable.of(batch), initial_entropy=1.0)

    def with_loss(loss: Any) -> Any:
        return replace(good, loss=loss)

    def infinite(micro_batch: Any, statistics: Any) -> Any:
        loss, report = good.loss(micro_batch, statistics)
        return loss * torch.inf, report

    def nan_gradient(micro_batch: Any, statistics: Any) -> Any:
        loss, report = good.loss(micro_batch, statistics)
        return loss + (
            statistics.logprobs[:1] * 0
        ).sqrt().sum(), report  # 0, with a derivative of 0 times infinity

    done = []
    for objective in (good, with_loss(infinite), with_loss(nan_gradient), good):
        passed = forward_backward(run.policy, micro_batches, objective, len(batch))
        update = apply_update(run.optimizer, run.policy, passed.loss)
        state = run.optimizer.megatron.optimizer.state
        done.append(
            {
                "loss": passed.loss,
                "applied": update.applied,
                "grad_norm": update.grad_norm,
                "weights": {name: t.numpy().copy() for name, t in export_hf_weights(run.policy)},
                "state": [{k: v.clone().numpy() for k, v in entry.items()} for entry in state.values()],
                "updates": run.optimizer.schedule.num_steps,
            }
        )
    return done
