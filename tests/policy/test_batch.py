"""Packing into one row: what is predicted where, for one rank and for context-parallel shares."""

import numpy as np
import pytest
import torch

from gtpo_megatron.policy.batch import MicroBatch, make_micro_batch
from gtpo_megatron.trajectories.record import Trajectory

PAD = 9


def trajectory(prompt: int, length: int, first: int) -> Trajectory:
    """Token ids count up from `first`, so that every token of a batch says whose it is."""
    ids = np.arange(first, first + prompt + length, dtype=np.int32)
    return Trajectory(
        step=0,
        group=0,
        index=0,
        prompt_id="",
        prompt_ids=ids[:prompt],
        token_ids=ids[prompt:],
        logprobs=-ids[prompt:].astype(np.float32),
        token_versions=np.zeros(length, np.int32),
        finish_reason="stop",
    )


BATCH = [trajectory(3, 4, 100), trajectory(1, 1, 200), trajectory(5, 2, 300), trajectory(2, 9, 400)]


def test_one_rank_against_a_plain_computation() -> None:
    batch = make_micro_batch(BATCH, [3, 0, 1], pad_id=PAD)
    expected_tokens, expected_positions, predicted = [], [], []
    for place, index in enumerate([3, 0, 1]):
        t = BATCH[index]
        start = len(expected_tokens)
        ids = [*t.prompt_ids, *t.token_ids]
        for offset, token in enumerate(t.token_ids):
            predicted.append((start + len(t.prompt_ids) + offset - 1, token, place, offset))
        expected_tokens += ids
        expected_positions += range(len(ids))
    assert batch.tokens.tolist() == [expected_tokens]
    assert batch.position_ids.tolist() == [expected_positions]
    found = zip(batch.rows, batch.targets, batch.completion, batch.offset, strict=True)
    assert [tuple(map(int, entry)) for entry in found] == predicted
    assert batch.sampled_logprobs.tolist() == [-float(token) for _, token, *_ in predicted]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 11, 18, 20]
    assert batch.packed.cu_seqlens_q.dtype == torch.int32
    assert batch.packed.max_seqlen_q == 11
    assert (batch.lengths.tolist(), batch.max_length, batch.indices) == ([9, 4, 1], 9, (3, 0, 1))


def test_alignment_pads_each_sequence_and_predicts_nothing_from_padding() -> None:
    plain, aligned = (make_micro_batch(BATCH, range(4), alignment=a, pad_id=PAD) for a in (1, 8))
    assert aligned.packed.cu_seqlens_q.tolist() == [0, 8, 16, 24, 40]
    assert aligned.tokens.shape == (1, 40)
    assert int((aligned.tokens == PAD).sum()) == 40 - plain.tokens.numel()
    assert aligned.targets.tolist() == plain.targets.tolist()
    assert aligned.offset.tolist() == plain.offset.tolist()
    # the token before each target in the packed row is what it is predicted from
    for batch in (plain, aligned):
        assert (batch.tokens[0, batch.rows] + 1).tolist() == batch.targets.tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_shares_hold_each_token_once(ranks: int) -> None:
    alignment = 2 * ranks
    whole = make_micro_batch(BATCH, range(4), alignment=alignment, pad_id=PAD)
    shares = [
        make_micro_batch(
            BATCH, range(4), alignment=alignment, context_size=ranks, context_rank=rank, pad_id=PAD
        )
        for rank in range(ranks)
    ]
    assert {share.tokens.numel() for share in shares} == {whole.tokens.numel() // ranks}
    tokens = torch.cat([share.tokens for share in shares], dim=1)
    assert sorted(tokens[0].tolist()) == sorted(whole.tokens[0].tolist())
    entries = [entry for share in shares for entry in predictions(share)]
    assert sorted(entries) == sorted(predictions(whole))
    for share in shares:  # lengths and bounds are those of the whole sequences
        assert share.lengths.tolist() == whole.lengths.tolist()
        assert share.packed.cu_seqlens_q.tolist() == whole.packed.cu_seqlens_q.tolist()
        assert (share.tokens[0, share.rows] + 1).tolist() == share.targets.tolist()


def predictions(batch: MicroBatch) -> list[tuple[float, ...]]:
    columns = (batch.completion, batch.offset, batch.targets, batch.sampled_logprobs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_shares_are_zigzag() -> None:
    """Rank r holds chunks r and 2 ranks - 1 - r of each sequence, so that causal attention costs all ranks the same."""
    one = [trajectory(8, 8, 0)]
    shares = [make_micro_batch(one, [0], alignment=4, context_size=2, context_rank=r) for r in (0, 1)]
    assert shares[0].position_ids.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert shares[1].position_ids.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_to_do_is_a_row_of_padding(ranks: int) -> None:
    alignment = 2 * ranks
    batch = make_micro_batch(
        BATCH, [], alignment=alignment, context_size=ranks, context_rank=ranks - 1, pad_id=PAD
    )
    assert batch.tokens.tolist() == [[PAD] * (alignment // ranks)]
    assert batch.tokens.shape == batch.position_ids.shape
    assert batch.packed.cu_seqlens_q.tolist() == [0, alignment]
    assert (batch.indices, batch.max_length, batch.rows.numel(), batch.lengths.numel()) == ((), 0, 0, 0)
    assert batch.padded(torch.zeros(0)).shape == (0, 0)


def test_grid_and_sums_of_tokens() -> None:
    batch = make_micro_batch(BATCH, [0, 2])
    values = torch.arange(1.0, 7.0, requires_grad=True)  # 4 tokens of the first, 2 of the second
    grid = batch.padded(values)
    assert grid.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.per_completion(values).tolist() == [10, 11]
    (grid * torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])).sum().backward()
    assert values.grad.tolist() == [1, 2, 3, 4, 5, 6]
