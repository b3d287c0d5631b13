"""The golden cases: an independent oracle and the authors' own code computed them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_megatron import algorithm
from gtpo_megatron.algorithm import REFERENCE_ENTROPY_FLOOR, REFERENCE_GAMMA, REFERENCE_THRESHOLD

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "golden.json").read_text("utf-8")
)["cases"]
WITH_LOGITS = [index for index, case in enumerate(CASES) if case["logits"]]


def padded(rows: list[list[Any]], dtype: torch.dtype, filler: float = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=filler
    )


def inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids, lengths, advantages, group_ids."""
    ids = padded(case["completions"], torch.int64)
    lengths = torch.tensor([len(row) for row in case["completions"]])
    group_ids = torch.zeros_like(lengths)
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    return ids, lengths, algorithm.group_advantages(rewards, group_ids), group_ids


@pytest.mark.parametrize("index", range(len(CASES)))
def test_advantages_runs_weights_and_gate(index: int) -> None:
    case = CASES[index]
    ids, lengths, advantages, group_ids = inputs(case)
    assert advantages.tolist() == pytest.approx(case["advantages"], abs=1e-12)
    prefix, suffix = algorithm.conflict_runs(ids, lengths, advantages, group_ids)
    assert prefix.tolist() == case["prefix"]
    assert suffix.tolist() == case["suffix"]
    for compat in ("paper", "reference"):
        weights = algorithm.token_weights(prefix, suffix, lengths, advantages, ids.shape[1], compat=compat)
        assert torch.equal(weights, padded(case[f"weights_{compat}"], torch.float32))
    entropy = torch.tensor(case["mean_entropy"], dtype=torch.float64)
    assert (
        algorithm.entropy_gate(entropy, case["initial_entropy"], case["threshold"]).tolist() == case["gate"]
    )


def mode(case: dict[str, Any], compat: str, entropy: Tensor) -> tuple[Tensor, Tensor, float, Tensor | int]:
    """Weights, gate, gamma and normalizers of a mode."""
    ids, lengths, advantages, group_ids = inputs(case)
    prefix, suffix = algorithm.conflict_runs(ids, lengths, advantages, group_ids)
    weights = algorithm.token_weights(prefix, suffix, lengths, advantages, ids.shape[1], compat=compat)
    if compat == "paper":
        gate = algorithm.entropy_gate(entropy, case["initial_entropy"], case["threshold"])
        return weights, gate, case["gamma"], len(lengths)
    gate = algorithm.entropy_gate(entropy, float("nan"), REFERENCE_THRESHOLD, "always")
    normalizers = algorithm.completion_normalizers(group_ids, prefix, suffix, "reference")
    return weights, gate, REFERENCE_GAMMA, normalizers


@pytest.mark.parametrize("compat", ["paper", "reference"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_loss_from_mean_entropies(index: int, compat: str) -> None:
    # On policy every ratio is 1, so the loss needs no logits. The reference value was made with entropies that clip
    # probabilities at 1e-6, which the case does not hold: there the tolerance is gamma times that difference.
    case = CASES[index]
    _, lengths, advantages, _ = inputs(case)
    entropy = torch.tensor(case["mean_entropy"], dtype=torch.float64)
    weights, gate, gamma, normalizers = mode(case, compat, entropy)
    logprobs = -torch.rand(weights.shape, dtype=torch.float64)
    loss = algorithm.gtpo_loss(logprobs, entropy, weights, advantages, lengths, gate, gamma, normalizers)
    assert loss.item() == pytest.approx(case[f"loss_{compat}"], abs=1e-9 if compat == "paper" else 5e-6)


@pytest.mark.parametrize("compat", ["paper", "reference"])
@pytest.mark.parametrize("index", WITH_LOGITS)
def test_loss_and_gradient_from_logits(index: int, compat: str) -> None:
    case = CASES[index]
    ids, lengths, advantages, _ = inputs(case)
    logits = padded(case["logits"], torch.float64).requires_grad_()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    token_entropy = -(
        p * (p.clamp(min=REFERENCE_ENTROPY_FLOOR).log() if compat == "reference" else log_p)
    ).sum(-1)
    inside = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    entropy = (token_entropy * inside).sum(1) / lengths
    if compat == "paper":
        assert entropy.tolist() == pytest.approx(case["mean_entropy"], abs=1e-12)
    logprobs = log_p.gather(2, ids.unsqueeze(2)).squeeze(2)

    weights, gate, gamma, normalizers = mode(case, compat, entropy)
    loss = algorithm.gtpo_loss(logprobs, entropy, weights, advantages, lengths, gate, gamma, normalizers)
    loss.backward()
    assert loss.item() == pytest.approx(case[f"loss_{compat}"], abs=1e-9)
    assert logits.grad.norm().item() == pytest.approx(case[f"grad_norm_{compat}"], abs=1e-9)

    # The backward pass of a token is one scalar times (p - onehot).
    scale = gate * (advantages - gamma * entropy.detach()) / (lengths * normalizers)
    onehot = torch.nn.functional.one_hot(ids, p.shape[-1])
    expected = (scale.unsqueeze(1) * weights).unsqueeze(2) * (p.detach() - onehot)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)
