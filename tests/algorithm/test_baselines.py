"""GRPO, SFT and importance sampling against loops over tokens."""

import math

import pytest
import torch

from gtpo_megatron.algorithm import grpo_loss, importance_weights, sft_loss

LENGTHS = torch.tensor([4, 1, 3])
NAN = float("nan")


def rows(seed: int, scale: float = 1.0) -> torch.Tensor:
    """[3, 5] log-probabilities with NaN beyond the lengths."""
    values = -scale * torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.masked_fill(torch.arange(5) >= LENGTHS.unsqueeze(1), NAN)


def inside() -> torch.Tensor:
    return (torch.arange(5) < LENGTHS.unsqueeze(1)).float()


def test_grpo_loss_and_diagnostics() -> None:
    new, old, ref = rows(1).requires_grad_(), rows(2), rows(3)
    advantages = torch.tensor([0.7, -1.2, -0.4], dtype=torch.float64)
    weights = inside() * torch.tensor([[1.0], [0.5], [2.0]])
    loss, diagnostics = grpo_loss(
        new, weights, advantages, LENGTHS, 3,
        clip_low=0.1, clip_high=0.3, old_logprobs=old, ref_logprobs=ref, beta=0.05,
    )  # fmt: skip
    loss.backward()
    now = new.detach()
    total, low, high, kl, ratios = 0.0, 0, 0, 0.0, 0.0
    gradient = torch.zeros(3, 5, dtype=torch.float64)
    for i, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            r, a, w = math.exp(now[i, t] - old[i, t]), float(advantages[i]), float(weights[i, t])
            gap = float(ref[i, t] - now[i, t])
            clipped = (a > 0 and r > 1.3) or (a < 0 and r < 0.9)
            k3 = math.exp(gap) - gap - 1
            total += (-w * min(r * a, min(max(r, 0.9), 1.3) * a) + 0.05 * k3) / length / 3
            gradient[i, t] = ((0.0 if clipped else -w * r * a) + 0.05 * (1 - math.exp(gap))) / length / 3
            low, high = low + (clipped and a < 0), high + (clipped and a > 0)
            kl, ratios = kl + k3, ratios + r
    assert low and high
    assert loss.item() == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(new.grad, gradient, rtol=0, atol=1e-12)
    assert (diagnostics.tokens.item(), diagnostics.clipped_low.item(), diagnostics.clipped_high.item()) == (
        8,
        low,
        high,
    )
    assert diagnostics.clip_fraction.item() == pytest.approx((low + high) / 8)
    assert diagnostics.mean_kl.item() == pytest.approx(kl / 8, abs=1e-12)
    assert diagnostics.ratio.item() == pytest.approx(ratios, abs=1e-12)


def test_grpo_on_policy_is_the_policy_gradient() -> None:
    new = rows(1).requires_grad_()
    advantages = torch.tensor([0.7, -1.2, -0.4], dtype=torch.float64)
    loss, diagnostics = grpo_loss(new, inside(), advantages, LENGTHS, 3)
    loss.backward()
    expected = -(advantages / LENGTHS / 3).unsqueeze(1) * inside()
    torch.testing.assert_close(new.grad, expected, rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(-advantages.sum().item() / 3)
    assert diagnostics.clip_fraction.item() == diagnostics.mean_kl.item() == 0


def test_only_a_ratio_beyond_its_bound_is_clipped_and_only_where_there_is_an_advantage() -> None:
    one, lengths = torch.ones(3, 1, dtype=torch.float64), torch.ones(3, dtype=torch.int64)
    advantages = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    _, at_the_bounds = grpo_loss(one, one, advantages, lengths, 3, clip_low=0.0, clip_high=0.0)
    assert at_the_bounds.clip_fraction.item() == 0
    for old in (0.0, 2.0):  # ratios of e and 1 / e: each is beyond one bound, and the third has no side
        _, beyond = grpo_loss(one, one, advantages, lengths, 3, old_logprobs=old * one)
        assert beyond.clip_fraction.item() == pytest.approx(1 / 3)


def test_sft_is_the_mean_over_tokens_of_the_step() -> None:
    new = rows(1).requires_grad_()
    parts = [sft_loss(new[:2], inside()[:2], 8), sft_loss(new[2:], inside()[2:], 8)]
    sum(parts).backward()
    expected = -sum(new.detach()[i, t].item() for i, length in enumerate(LENGTHS) for t in range(length)) / 8
    assert sum(parts).item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(new.grad, -inside().double() / 8, rtol=0, atol=1e-15)


def test_importance_weights_of_tokens() -> None:
    trainer, sampler = rows(1).requires_grad_(), rows(2)
    result = importance_weights(trainer, sampler, LENGTHS, level="token", cap=1.2)
    ratio = (trainer.detach() - sampler).exp()
    assert not result.weights.requires_grad
    torch.testing.assert_close(result.weights, ratio.clamp(max=1.2).nan_to_num(0.0))
    assert 0 < result.truncated_share.item() == pytest.approx((ratio > 1.2).sum().item() / 8)


def test_importance_weights_of_sequences() -> None:
    trainer, sampler = rows(1), rows(2)
    ratio = (trainer - sampler).nansum(1).exp()
    cap = ratio.sort().values[1].item() + 1e-3
    result = importance_weights(trainer, sampler, LENGTHS, level="sequence", cap=cap)
    torch.testing.assert_close(result.weights, ratio.clamp(max=cap).unsqueeze(1) * inside().double())
    assert result.truncated_share.item() == pytest.approx(1 / 3)


def test_importance_weights_of_a_long_divergent_sequence_are_capped_not_infinite() -> None:
    trainer, sampler = torch.zeros(1, 1000), torch.full((1, 1000), -5.0)
    result = importance_weights(trainer, sampler, torch.tensor([1000]), level="sequence", cap=2.0)
    assert (result.weights == 2.0).all()


def test_the_clipping_range_is_a_fifth_by_default_and_a_single_token_is_the_whole_share() -> None:
    one, length = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    for ratio, advantage, clipped in ((1.19, 1.0, 0), (1.21, 1.0, 1), (0.81, -1.0, 0), (0.79, -1.0, 1)):
        new = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
        advantages = torch.tensor([advantage], dtype=torch.float64)
        _, diagnostics = grpo_loss(new, one, advantages, length, 1, old_logprobs=torch.zeros_like(new))
        assert diagnostics.clip_fraction.item() == clipped


def test_the_mean_kl_of_a_single_token_is_its_own() -> None:
    one, length = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    new = torch.zeros(1, 1, dtype=torch.float64)
    _, diagnostics = grpo_loss(new, one, new[0], length, 1, ref_logprobs=new + 0.5, beta=0.1)
    assert diagnostics.mean_kl.item() == pytest.approx(math.exp(0.5) - 1.5, abs=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_single_token_above_the_cap_is_the_whole_share(level: str) -> None:
    result = importance_weights(
        torch.zeros(1, 1), torch.full((1, 1), -1.0), torch.tensor([1]), level=level, cap=2.0
    )
    assert (result.weights.item(), result.truncated_share.item()) == (2.0, 1.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_at_the_cap_is_not_cut(level: str) -> None:
    same = torch.zeros(2, 3)
    result = importance_weights(same, same, torch.tensor([3, 1]), level=level, cap=1.0)
    assert result.truncated_share.item() == 0
    assert result.weights.tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_a_step_of_one_token_is_a_mean_over_it() -> None:
    assert sft_loss(torch.tensor([[-0.5]]), torch.ones(1, 1), 1).item() == 0.5
