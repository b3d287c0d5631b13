"""What a step took beside its seconds: model FLOP, rates, memory by part. Read off what is there anyway."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gtpo_megatron import control
from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.plan.facts import of_shape
from gtpo_megatron.plan.flop import Pass, batch_flop, scoring_passes
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.memory import held_bytes
from gtpo_megatron.policy.model import Policy
from gtpo_megatron.policy.optimizer import Optimizer
from gtpo_megatron.rollout.protocol import NamedTensor, RolloutEngine
from gtpo_megatron.run.facts import RunFacts

GIB = 2**30


@dataclass
class Flow:
    """Things that were made or moved, and the seconds that it took."""

    amount: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """For a second; None where nothing was moved."""
        return self.amount / self.seconds if self.amount and self.seconds else None

    def add(self, amount: float, seconds: float) -> None:
        self.amount += amount
        self.seconds += seconds


def send(engine: RolloutEngine, weights: Iterable[NamedTensor], version: int) -> Flow:
    """Give an engine its weights; their bytes, each once however many servers there are."""
    sent, started = Flow(), time.perf_counter()

    def counted() -> Iterator[NamedTensor]:
        for name, tensor in weights:
            sent.amount += tensor.numel() * tensor.element_size()
            yield name, tensor

    engine.update_weights(counted(), version)
    sent.seconds = time.perf_counter() - started
    return sent


@dataclass(frozen=True)
class Passes:
    """How often a step's batch went through the model."""

    forward: int  # scoring alone
    training: int  # forward and backward

    @classmethod
    def of(cls, algorithm: AlgorithmConfig, *, first: bool, updates: int) -> "Passes":
        """`first`: of a run of GTPO, whose initial entropy is measured before. `updates`: that were tried."""
        initial = int(first and algorithm.name == "gtpo")
        return cls(initial + scoring_passes(algorithm), updates)


@dataclass(frozen=True)
class Costs:
    """Of a step, but for what its metrics have already."""

    passes: Passes
    memory: dict[str, float]  # metrics, see `memory_metrics`
    sampled: Flow | None  # generated tokens of rank 0's engine; None where the batch was read from the store


def memory_metrics(policy: Policy, reference: Policy | None, optimizer: Optimizer) -> dict[str, float]:
    """GiB by part, of each the largest of all ranks. Collective; a sum over tensors that are there, and one small message."""
    held = held_bytes([policy] if reference is None else [policy, reference], optimizer)
    values = control.largest([*(size / GIB for size in held.values()), platform.peak_memory_gib()])
    return {f"memory/{part}_gib": value for part, value in zip([*held, "peak"], values, strict=True)}


def speed_metrics(
    facts: RunFacts,
    costs: Costs,
    transferred: Flow | None,
    lengths: Sequence[int],
    seconds: Mapping[str, float],
    *,
    frozen: bool = False,
) -> dict[str, float]:
    """Tokens, model FLOP and rates of a step; MFU where the GPU is known, of its dense BF16 rate.

    Args:
        transferred: bytes of weights to the engine, if any went there.
        lengths: tokens of each sequence of the batch, prompts included.
        seconds: of the step's stages.
        frozen: the weights are not trained (LoRA).
    """
    model, kind = of_shape(facts.shape, ""), "frozen" if frozen else "training"
    done: dict[Pass, int] = {"forward": costs.passes.forward, kind: costs.passes.training}
    flop = sum(count * batch_flop(model, lengths, name) for name, count in done.items())
    tokens, whole = sum(lengths), sum(seconds.values())
    metrics = {
        "tokens": tokens,
        "model_flop": flop,
        "world_size": facts.world_size,
        "tokens_per_second": tokens / whole,
        "speed/tokens_per_second_per_rank": tokens / whole / facts.world_size,
    }
    if (gpu := facts.gpu) is not None:
        peak = gpu.bf16 * facts.world_size
        metrics["speed/mfu_training"] = flop / seconds["training"] / peak
        metrics["speed/mfu_step"] = flop / whole / peak
    if costs.sampled is not None and costs.sampled.rate:
        metrics["speed/sampling_tokens_per_second"] = costs.sampled.rate
    if transferred is not None and transferred.rate:
        metrics["speed/weights_gb_per_second"] = transferred.rate / 1e9
    return metrics | costs.memory
