"""Against the slow oracle on random groups, and what must not change the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_megatron import algorithm
from gtpo_megatron.algorithm import conflicts
from tests.algorithm import oracle
from tests.algorithm.oracle import Batch, batches

quick = settings(max_examples=40, deadline=None)


def tensors(batch: Batch, seed: int, spare: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids with garbage (any 64-bit value, negative too) beyond the lengths; lengths; group_ids."""
    lengths = torch.tensor([len(row) for row in batch.completions])
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), int(lengths.max()) + spare)
    ids = torch.randint(-(2**62), 2**62, shape, generator=generator)
    ids[:, ::2] = torch.randint(
        -1, 2, ids[:, ::2].shape, generator=generator
    )  # garbage that collides with tokens
    for row, completion in zip(ids, batch.completions, strict=True):
        row[: len(completion)] = torch.tensor(completion)
    return ids, lengths, torch.tensor(batch.groups)


@quick
@given(batches(), st.sampled_from([torch.float32, torch.float64]))
def test_advantages(batch: Batch, dtype: torch.dtype) -> None:
    rewards = torch.tensor(batch.rewards, dtype=dtype)
    result = algorithm.group_advantages(rewards, torch.tensor(batch.groups))
    expected = oracle.advantages(batch)
    assert result.dtype == dtype
    assert result.tolist() == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 1e-13)
    assert [a == 0 for a in result.tolist()] == [a == 0 for a in expected]


@quick
@given(batches(), st.integers(0, 1000), st.sampled_from([(1, 1), (2, 5), (8, 1 << 17)]))
def test_runs_and_weights(batch: Batch, seed: int, blocks: tuple[int, int]) -> None:
    expected = oracle.advantages(batch)
    ids, lengths, group_ids = tensors(batch, seed)
    advantages = algorithm.group_advantages(torch.tensor(batch.rewards, dtype=torch.float64), group_ids)
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that runs cross their borders
        patch.setattr(conflicts, "FIRST_WIDTH", blocks[0])
        patch.setattr(conflicts, "BLOCK_TOKENS", blocks[1])
        prefix, suffix = algorithm.conflict_runs(ids, lengths, advantages, group_ids)
    assert (prefix.tolist(), suffix.tolist()) == oracle.runs(batch, expected)
    for compat in ("paper", "reference"):
        weights = algorithm.token_weights(prefix, suffix, lengths, advantages, ids.shape[1], 1.5, compat)
        for i, row in enumerate(weights.tolist()):
            length, facts = (
                len(batch.completions[i]),
                (int(prefix[i]), int(suffix[i]), expected[i], 1.5, compat),
            )
            inside = [oracle.weight(t, length, *facts) for t in range(length)]
            assert row == inside + [0.0] * (ids.shape[1] - length)


def random_step(batch: Batch, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arguments of `gtpo_loss` but for gamma, with NaN and infinities beyond the lengths."""
    ids, lengths, group_ids = tensors(batch, seed)
    generator = torch.Generator().manual_seed(seed)
    advantages = algorithm.group_advantages(torch.tensor(batch.rewards, dtype=dtype), group_ids)
    prefix, suffix = algorithm.conflict_runs(ids, lengths, advantages, group_ids)
    outside = torch.arange(ids.shape[1]) >= lengths.unsqueeze(1)
    logprobs = -torch.rand(ids.shape, generator=generator, dtype=dtype)
    old = logprobs + 0.1 * torch.randn(ids.shape, generator=generator, dtype=dtype)
    return {
        "logprobs": logprobs.masked_fill(outside, float("nan")),
        "mean_entropy": torch.rand(len(lengths), generator=generator, dtype=dtype),
        "weights": algorithm.token_weights(prefix, suffix, lengths, advantages, ids.shape[1]),
        "advantages": advantages,
        "lengths": lengths,
        "gate": torch.randint(0, 2, lengths.shape, generator=generator).to(dtype),
        "num_completions": algorithm.completion_normalizers(group_ids),
        "old_logprobs": old.masked_fill(outside, float("-inf")),
    }


def loss_and_gradient(step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logprobs = step["logprobs"].clone().requires_grad_()
    loss = algorithm.gtpo_loss(**{**step, "logprobs": logprobs}, gamma=0.1)
    loss.backward()
    return loss.detach(), logprobs.grad


@quick
@given(batches(), st.integers(0, 1000), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_loss(batch: Batch, seed: int, on_policy: bool, dtype: torch.dtype) -> None:
    step = random_step(batch, seed, dtype)
    lengths = step["lengths"].tolist()

    def rows(name: str) -> list[list[float]]:
        return [row[:length] for row, length in zip(step[name].tolist(), lengths, strict=True)]

    expected = oracle.loss(
        batch,
        oracle.advantages(batch),
        rows("weights"),
        rows("logprobs"),
        rows("logprobs" if on_policy else "old_logprobs"),
        step["mean_entropy"].tolist(),
        step["gate"].tolist(),
        0.1,
    )
    if on_policy:
        step["old_logprobs"] = None
    loss, gradient = loss_and_gradient(step)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 1e-12)
    # d loss / d logp is the token's own term: all terms together give the loss again.
    assert gradient.isfinite().all()
    assert gradient.sum().item() == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 1e-12)


@quick
@given(batches(), st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3))
def test_loss_does_not_depend_on_micro_batches_nor_on_context_ranks(
    batch: Batch, seed: int, micro_batches: int, context_ranks: int
) -> None:
    whole = random_step(batch, seed)
    expected, expected_gradient = loss_and_gradient(whole)
    generator = torch.Generator().manual_seed(seed)
    micro_batch = torch.randint(0, micro_batches, whole["lengths"].shape, generator=generator)
    owner = torch.randint(0, context_ranks, whole["weights"].shape, generator=generator)
    total, total_gradient = torch.zeros(()), torch.zeros_like(expected_gradient)
    for m in range(micro_batches):
        part = {name: value[micro_batch == m] for name, value in whole.items()}
        for rank in range(context_ranks):
            elsewhere = owner[micro_batch == m] != rank
            local = {
                **part,
                "weights": part["weights"].masked_fill(elsewhere, 0.0),
                "logprobs": part["logprobs"].masked_fill(elsewhere, float("nan")),
            }
            loss, gradient = loss_and_gradient(local)
            total = total + loss
            total_gradient[micro_batch == m] += gradient
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(total_gradient, expected_gradient, rtol=0, atol=1e-12)


@quick
@given(batches(), st.integers(0, 1000))
def test_groups_can_be_analysed_apart_or_in_one_call(batch: Batch, seed: int) -> None:
    ids, lengths, group_ids = tensors(batch, seed)
    advantages = algorithm.group_advantages(torch.tensor(batch.rewards), group_ids)
    prefix, suffix = algorithm.conflict_runs(ids, lengths, advantages, group_ids)
    for group in group_ids.unique():
        own = group_ids == group
        alone = algorithm.conflict_runs(ids[own], lengths[own], advantages[own], group_ids[own])
        assert torch.equal(alone[0], prefix[own])
        assert torch.equal(alone[1], suffix[own])
