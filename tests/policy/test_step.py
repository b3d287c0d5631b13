"""A step of training: how many passes it makes, its loss and gradient against transformers, and updates that are skipped."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ImportanceConfig
from gtpo_megatron.trajectories.record import Trajectory
from tests.parallel.layout_job import sample_batch
from tests.parallel.pool import RankPool
from tests.policy.step_jobs import (
    LARGE,
    SMALL,
    bad_updates,
    loss_and_gradients,
    padded_passes,
    passes_of_steps,
    second_step,
)
from tests.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("policy"), "qwen3", initializer_range=0.1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another policy, not far from the first."""
    directory = make_tiny_checkpoint(tmp_path_factory.mktemp("reference"), "qwen3", initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003)
    model.save_pretrained(directory)
    return directory


GRPO = {"name": "grpo", "clip_high": 0.1}


@pytest.mark.parametrize(
    ("algorithm", "first", "second", "backward"),
    [
        pytest.param({}, 2, 1, 1, id="gtpo: the initial entropy costs one forward pass, once"),
        pytest.param({"compat": "reference"}, 2, 1, 1, id="gtpo as the authors' code"),
        pytest.param({"updates_per_batch": 2}, 4, 3, 2, id="gtpo with two updates needs the old policy's"),
        pytest.param({"updates_per_batch": 2, "old_logprobs": "sampler"}, 3, 2, 2, id="or the sampler's"),
        pytest.param(GRPO, 1, 1, 1, id="grpo"),
        pytest.param(GRPO | {"kl_beta": 0.1}, 1, 1, 1, id="grpo with a reference policy"),
        pytest.param({"name": "sft"}, 1, 1, 1, id="sft"),
    ],
)
def test_passes_per_micro_batch(
    algorithm: dict[str, Any],
    first: int,
    second: int,
    backward: int,
    ranks: RankPool,
    checkpoint: Path,
    reference: Path,
) -> None:
    other = reference if "kl_beta" in algorithm else None
    ((count, steps, of_reference),) = ranks.run(
        1, passes_of_steps, checkpoint, AlgorithmConfig(**algorithm), other
    )
    assert count > 2
    assert steps == [
        {"forward": first * count, "backward": backward * count},
        {"forward": second * count, "backward": backward * count},
    ]
    assert of_reference == (2 * count if other else 0)


def token_logits(model: PreTrainedModel, t: Trajectory, temperature: float) -> torch.Tensor:
    """[length, vocabulary] from which each token of the completion was predicted."""
    ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.token_ids])).long()
    return model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1] / temperature


def chosen(logits: torch.Tensor, t: Trajectory) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, torch.from_numpy(t.token_ids).long()[:, None])[:, 0]


def gtpo_by_the_text(
    config: AlgorithmConfig, logits: torch.Tensor, t: Trajectory, groups: int, size: int, initial: float
) -> torch.Tensor:
    """A completion's part of the GTPO loss, token by token."""
    probabilities, like_reference = logits.softmax(-1), config.compat == "reference"
    floor = probabilities.clamp(min=1e-6).log() if like_reference else logits.log_softmax(-1)
    entropy = -(probabilities * floor).sum(-1).mean().item()
    threshold = 0.7 if like_reference else config.gate.threshold
    filtered = config.gate.mode == "paper" or t.advantage < 0
    if (like_reference or initial <= threshold) and entropy > threshold and filtered:
        return logits.sum() * 0
    total = torch.zeros(())
    for place, logprob in enumerate(chosen(logits, t)):
        runs = (place < t.prefix) + (place >= t.length - t.suffix)
        signed = config.positive_weight if t.advantage > 0 else config.negative_weight
        in_conflict = signed if t.advantage else 1.0
        weight = (in_conflict ** (runs if like_reference else 1)) if runs else 1.0
        gap = logprob.item() - float(t.logprobs[place])
        if config.importance.level == "token":
            weight *= min(config.importance.cap, math.exp(gap))
        old = t.logprobs[place].item() if config.old_logprobs == "sampler" else logprob.detach()
        total = total + weight * (logprob - old).exp()
    loss = -(t.advantage - config.gamma * entropy) / t.length * total / groups
    return loss / max(1, t.prefix, t.suffix) if like_reference else loss / size


def grpo_by_the_text(
    config: AlgorithmConfig, logits: torch.Tensor, t: Trajectory, other: torch.Tensor
) -> torch.Tensor:
    """A completion's GRPO loss with the k3 estimate of the KL divergence, token by token."""
    total = torch.zeros(())
    for logprob, old, ref in zip(
        chosen(logits, t), t.logprobs.tolist(), chosen(other, t).detach(), strict=True
    ):
        ratio = (logprob - old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        kl = (ref - logprob).exp() - (ref - logprob) - 1
        total = total - torch.minimum(ratio * t.advantage, clipped * t.advantage) + config.kl_beta * kl
    return total / t.length


COLD = 0.1  # the temperature at which some of the completions' mean entropies are below ln 2
OBJECTIVES = {
    "gtpo": AlgorithmConfig(),
    "gtpo-gated": AlgorithmConfig(),
    "gtpo-only-negative-gated": AlgorithmConfig(gate=GateConfig(mode="only_negative")),
    "gtpo-reference": AlgorithmConfig(compat="reference"),
    "gtpo-off-policy": AlgorithmConfig(old_logprobs="sampler", positive_weight=3.0, gamma=0.3),
    "gtpo-half-protected": AlgorithmConfig(negative_weight=0.5, positive_weight=1.0),
    "gtpo-importance": AlgorithmConfig(importance=ImportanceConfig(level="token", cap=1.1)),
    "grpo-kl": AlgorithmConfig(name="grpo", clip_high=0.1, kl_beta=0.2, old_logprobs="sampler"),
    "sft": AlgorithmConfig(name="sft"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_text(
    name: str, ranks: RankPool, checkpoint: Path, reference: Path
) -> None:
    config = OBJECTIVES[name]
    gated = name in ("gtpo-gated", "gtpo-only-negative-gated", "gtpo-reference")
    temperature, initial = (COLD, 0.6) if gated else (1.0, 5.0)
    model, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (checkpoint, reference)
    )
    noise = np.random.default_rng(0)
    batch, losses = [], []
    for t in sample_batch(groups=2):
        logits = token_logits(model, t, temperature)
        sampled = chosen(logits, t).detach().numpy() + noise.normal(0, 0.2, t.length).astype(np.float32)
        batch.append(replace(t, logprobs=sampled))
        if config.name == "gtpo":
            losses.append(gtpo_by_the_text(config, logits, batch[-1], 2, 4, initial))
        elif config.name == "grpo":
            losses.append(
                grpo_by_the_text(config, logits, batch[-1], token_logits(other, t, temperature)) / 8
            )
        else:
            losses.append(-chosen(logits, t).sum() / sum(t.length for t in sample_batch(groups=2)))
    loss = torch.stack(losses).sum()
    loss.backward()
    dropped = sum(part.item() == 0 for part in losses)
    assert (0 < dropped < len(batch)) == gated  # the gate is seen to open and to shut

    ((found, gradients, sums),) = ranks.run(
        1, loss_and_gradients, checkpoint, reference, batch, config, initial, temperature
    )
    assert found == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    scale = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in expected.values()))
    for parameter, gradient in expected.items():
        difference = np.linalg.norm(gradients[parameter] - gradient)
        assert difference <= 2e-5 * max(np.linalg.norm(gradient), 0.01 * scale), parameter
    if config.kl_beta:
        assert sums["kl"] > 0 and sums["clipped"] > 0


def test_gradients_after_an_update_count_every_micro_batch_once(ranks: RankPool, checkpoint: Path) -> None:
    """Megatron's fp32 optimizer leaves each parameter's gradient an alias of the buffer that the next pass adds it to."""
    ((several, found, fresh),) = ranks.run(1, second_step, checkpoint, SMALL)
    ((one, found_at_once, _),) = ranks.run(1, second_step, checkpoint, LARGE)
    assert several > 2 and one == 1
    for name, gradient in fresh.items():
        np.testing.assert_array_equal(found[name], gradient, err_msg=name)
        difference = np.linalg.norm(found[name] - found_at_once[name])
        assert difference <= 1e-4 * np.linalg.norm(gradient), name


def test_padding_changes_neither_loss_nor_gradients(ranks: RankPool, checkpoint: Path) -> None:
    ((plain, padded),) = ranks.run(1, padded_passes, checkpoint, (1, 16))
    assert padded[0] > plain[0] and padded[0] % 16 == 0
    assert padded[1] == pytest.approx(plain[1], rel=1e-6)
    for name, gradient in plain[2].items():
        difference = np.linalg.norm(padded[2][name] - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient), name


def test_what_is_not_finite_changes_nothing(ranks: RankPool, tiny_checkpoint: Callable[[str], Path]) -> None:
    ((good, infinite, nan, after),) = ranks.run(1, bad_updates, tiny_checkpoint("qwen2"))
    assert [entry["applied"] for entry in (good, infinite, nan, after)] == [True, False, False, True]
    assert not math.isfinite(infinite["loss"])
    assert math.isfinite(nan["loss"]) and math.isnan(nan["grad_norm"])
    for bad in (infinite, nan):
        assert bad["updates"] == good["updates"]
        for name, weight in good["weights"].items():
            np.testing.assert_array_equal(bad["weights"][name], weight, err_msg=name)
        for entry, other in zip(bad["state"], good["state"], strict=True):
            assert entry.keys() == other.keys() >= {"exp_avg", "exp_avg_sq"}
            for key in entry:
                np.testing.assert_array_equal(entry[key], other[key], err_msg=key)
    assert after["updates"] == good["updates"] + 1
    assert math.isfinite(after["grad_norm"])
    assert any((after["weights"][name] != weight).any() for name, weight in good["weights"].items())
