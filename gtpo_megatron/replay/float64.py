"""One training step again in float64, by plain PyTorch and transformers, from the specification alone.

Nothing of `algorithm`, `policy` or Megatron is used here: what this file and a run agree on, two programs found.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.record import Trajectory

REFERENCE = {"threshold": 0.7, "gamma": 0.1, "floor": 1e-6}  # of the authors' code
STD_EPSILON = 1e-4
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Part:
    """A completion's part in the loss before its log-probabilities are known."""

    advantage: float
    prefix: int
    suffix: int
    weights: Tensor  # [L] float64
    divisor: float  # what its loss is divided by, its length included


@dataclass(frozen=True)
class Completion:
    """A completion as recomputed."""

    part: Part
    entropy: float  # mean of the tokens, nats
    gate: float
    coefficient: float
    share: float  # of the loss
    logprobs: Tensor  # [L]


@dataclass(frozen=True)
class Step:
    """A step as recomputed."""

    loss: float
    grad_norm: float
    completions: tuple[Completion, ...]


class Policy:
    """A Hugging Face causal language model in float64.

    Args:
        directory: of the weights.
        dtype: "bf16" or "fp32": the type in which the run computes with them; they are rounded to it first.
    """

    def __init__(self, directory: Path | str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=_TYPES[dtype], attn_implementation="sdpa", local_files_only=True
        )
        self.model: nn.Module = model.double().train()
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):  # transformers' own goes to float32 inside
                module.forward = _rms_norm(module)

    def tokens(
        self, trajectory: Trajectory, temperature: float, floor: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each generated token, nats: [L] each, the former differentiable."""
        ids = [*trajectory.prompt_ids.tolist(), *trajectory.token_ids.tolist()]
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        first = len(trajectory.prompt_ids) - 1
        logits = logits[first : first + trajectory.length].double() / temperature
        logprobs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            p = logprobs.exp()
            bounded = logprobs if floor is None else p.clamp(min=floor).log()
            entropy = -(p * bounded).sum(-1)
        targets = torch.tensor(trajectory.token_ids, dtype=torch.int64)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    def grad_norm(self) -> float:
        """Norm of the whole gradient; a tied weight counts once."""
        squares = [float(p.grad.square().sum()) for p in self.model.parameters() if p.grad is not None]
        return math.sqrt(math.fsum(squares))


def _rms_norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    epsilon = module.variance_epsilon

    def forward(hidden: Tensor) -> Tensor:
        return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)

    return forward


def recompute(
    policy: Policy,
    batch: Sequence[Trajectory],
    algorithm: Mapping[str, Any],
    temperature: float,
    initial_entropy: float | None,
    reference: Policy | None = None,
) -> Step:
    """Loss, gradient norm and every completion's share of a step with one update.

    Args:
        policy: with the weights before the step.
        batch: the step's completions; of what was computed from them nothing is used, only tokens and rewards.
        algorithm: the run's section of that name.
        temperature: of sampling.
        initial_entropy: H_ini, nats; None if the batch is the run's first, where it is measured.
        reference: the frozen policy of GRPO's KL term.

    Raises:
        UserError: a step of several updates.
    """
    if algorithm["updates_per_batch"] != 1:
        raise UserError(
            "algorithm.updates_per_batch: a step of several updates cannot be replayed, only one of one update"
        )
    parts = parts_of(batch, algorithm)
    floor = REFERENCE["floor"] if algorithm["compat"] == "reference" else None
    if initial_entropy is None:
        with torch.no_grad():
            means = [float(policy.tokens(t, temperature, floor)[1].mean()) for t in batch]
        initial_entropy = math.fsum(means) / len(means)
    policy.model.zero_grad()
    completions = []
    for trajectory, part in zip(batch, parts, strict=True):
        logprobs, entropy = policy.tokens(trajectory, temperature, floor)
        other = None
        if reference is not None:
            with torch.no_grad():
                other = reference.tokens(trajectory, temperature)[0]
        found, share = _share(trajectory, part, logprobs, entropy, other, algorithm, initial_entropy)
        share.backward()
        completions.append(found)
    return Step(math.fsum(c.share for c in completions), policy.grad_norm(), tuple(completions))


def _share(
    trajectory: Trajectory,
    part: Part,
    logprobs: Tensor,
    entropy: Tensor,
    reference: Tensor | None,
    algorithm: Mapping[str, Any],
    initial_entropy: float,
) -> tuple[Completion, Tensor]:
    sampled = torch.tensor(trajectory.logprobs, dtype=torch.float64)
    old = sampled if algorithm["old_logprobs"] == "sampler" else logprobs.detach()
    ratio = (logprobs - old).exp()
    weights = part.weights * importance(old - sampled, algorithm["importance"])
    mean = float(entropy.mean())
    if algorithm["name"] == "gtpo":
        gate = gate_of(mean, initial_entropy, part.advantage, algorithm)
        gamma = REFERENCE["gamma"] if algorithm["compat"] == "reference" else algorithm["gamma"]
        coefficient = gate * (part.advantage - gamma * mean) / part.divisor
        share = -coefficient * (weights * ratio).sum()
    else:
        gate, coefficient = 1.0, part.advantage / part.divisor
        clipped = ratio.clamp(1 - algorithm["clip_low"], 1 + algorithm["clip_high"])
        gain = torch.minimum(ratio * part.advantage, clipped * part.advantage)
        share = -(weights * gain).sum() / part.divisor
        if reference is not None:
            gap = reference - logprobs
            share = share + algorithm["kl_beta"] * (gap.exp() - gap - 1).sum() / part.divisor
    return Completion(part, mean, gate, coefficient, float(share.detach()), logprobs.detach()), share


def gate_of(entropy: float, initial: float, advantage: float, algorithm: Mapping[str, Any]) -> float:
    """1 or 0: whether GTPO's filter lets a completion of this mean entropy pass."""
    mode, threshold = algorithm["gate"]["mode"], algorithm["gate"]["threshold"]
    if algorithm["compat"] == "reference":
        mode = "always"
        threshold = REFERENCE["threshold"] if threshold == 0.6931471805599453 else threshold
    if mode == "off" or (mode != "always" and initial > threshold):
        return 1.0
    if mode == "only_negative" and advantage >= 0:
        return 1.0
    return float(entropy <= threshold)


def importance(gap: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Truncated weights [L] from log p(trainer) - log p(sampler) of the tokens."""
    if settings["level"] == "off":
        return torch.ones_like(gap)
    log_weight = gap.sum().expand_as(gap) if settings["level"] == "sequence" else gap
    return log_weight.exp().clamp(max=settings["cap"])


def parts_of(batch: Sequence[Trajectory], algorithm: Mapping[str, Any]) -> list[Part]:
    """Advantages, conflict runs, weights and divisors, from rewards and tokens."""
    groups: dict[int, list[int]] = {}
    for place, trajectory in enumerate(batch):
        groups.setdefault(trajectory.group, []).append(place)
    advantages = [0.0] * len(batch)
    for members in groups.values():
        rewards = [batch[place].reward for place in members]
        for place, advantage in zip(members, centred(rewards, by_deviation(algorithm)), strict=True):
            advantages[place] = advantage
    parts = []
    for place, trajectory in enumerate(batch):
        members = groups[trajectory.group]
        others = [batch[m].token_ids.tolist() for m in members if advantages[m] * advantages[place] < 0]
        tokens = trajectory.token_ids.tolist()
        prefix = run_length(tokens, others)
        suffix = run_length(tokens[::-1], [other[::-1] for other in others])
        reference = algorithm["compat"] == "reference"
        count = len(groups) * (max(1, prefix, suffix) if reference else len(members))
        weights = torch.ones(trajectory.length, dtype=torch.float64)
        if algorithm["name"] == "gtpo":
            weights = conflict_weights(trajectory.length, prefix, suffix, advantages[place], algorithm)
        parts.append(Part(advantages[place], prefix, suffix, weights, float(count * trajectory.length)))
    return parts


def by_deviation(algorithm: Mapping[str, Any]) -> bool:
    """Whether advantages are divided by their group's standard deviation. Runs of before the key have the default."""
    normalize = algorithm.get("normalize")
    return algorithm["name"] == "grpo" if normalize is None else normalize == "std"


def centred(rewards: Sequence[float], divide: bool) -> list[float]:
    """Rewards less their mean; what is rounding of the rewards alone is 0."""
    mean = math.fsum(rewards) / len(rewards)
    values = [reward - mean for reward in rewards]
    noise = 1e-14 * max(map(abs, rewards))
    values = [0.0 if abs(value) <= noise else value for value in values]
    if divide:
        deviation = math.sqrt(math.fsum(v * v for v in values) / max(len(values) - 1, 1))
        values = [value / (deviation + STD_EPSILON) for value in values]
    return values


def run_length(tokens: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """How many tokens from the start each stand at the same place in some other completion."""
    for place, token in enumerate(tokens):
        if not any(place < len(other) and other[place] == token for other in others):
            return place
    return len(tokens)


def conflict_weights(
    length: int, prefix: int, suffix: int, advantage: float, algorithm: Mapping[str, Any]
) -> Tensor:
    """[L]: 1, and in conflict the negative or the positive weight by the advantage's sign."""
    weight = 1.0
    if advantage:
        weight = algorithm["positive_weight"] if advantage > 0 else algorithm.get("negative_weight", 0.0)
    weights = torch.ones(length, dtype=torch.float64)
    for place in range(length):
        inside = (place < prefix) + (place >= length - suffix)
        if inside:
            weights[place] = weight**2 if inside == 2 and algorithm["compat"] == "reference" else weight
    return weights
