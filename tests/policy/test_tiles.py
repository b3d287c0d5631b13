"""How the head cuts its plane: sizes worked out by hand from the workspace."""

import pytest
import torch

from gtpo_megatron.policy.head.tiles import TilePlan, plan_tiles, spans

MIB = 2**20
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "token_tile", "vocab_tile", "expected"),
    [
        # a column: a logit and its scratch of 1,024 tokens; a tile of 4 MiB has 1,024 of them
        ((3000, 64), FP32, 151_936, None, None, TilePlan(1024, 1024, 64 * MIB - 2 * 1024 * 4 * 1024)),
        # and the weight's row in float32 with its gradient
        ((3000, 64), BF16, 151_936, None, None, TilePlan(1024, 1024, 64 * MIB - (2048 + 128) * 4 * 1024)),
        ((3000, 64), FP64, 151_936, None, None, TilePlan(1024, 512, 64 * MIB - 2 * 1024 * 8 * 512)),
        # 4 MiB hold 1,497 columns of 700 tokens: 5 times 256
        ((3000, 64), FP32, 151_936, 700, None, TilePlan(700, 1280, 64 * MIB - 2 * 700 * 4 * 1280)),
        # and 257 of 4,080: once
        ((8192, 1), FP32, 151_936, 4080, None, TilePlan(4080, 256, 64 * MIB - 2 * 4080 * 4 * 256)),
        # no more than a multiple of 256 would leave: 128 as they are
        ((8192, 1), FP32, 151_936, 8192, None, TilePlan(8192, 128, 64 * MIB - 2 * 8192 * 4 * 128)),
        ((3000, 64), FP32, 320, None, None, TilePlan(1024, 320, 64 * MIB - 2 * 1024 * 4 * 320)),
        ((10, 64), FP32, 320, None, 100, TilePlan(10, 100, 64 * MIB - 2 * 10 * 4 * 100)),
        ((0, 64), FP32, 320, None, None, TilePlan(1, 320, 64 * MIB - 2 * 4 * 320)),
        ((3000, 64), FP32, 151_936, None, 100_000, TilePlan(1024, 100_000, 0)),
        ((1, 10**7), BF16, 320, None, None, TilePlan(1, 1, 0)),  # a row is more than the workspace
    ],
)
def test_tiles_of_a_cpu(
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    token_tile: int | None,
    vocab_tile: int | None,
    expected: TilePlan,
) -> None:
    assert plan_tiles(torch.empty(shape, dtype=dtype), rows, token_tile, vocab_tile) == expected


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [
        # 1 GiB holds 8,192 columns of 8,192 tokens: a logit in two types, scratch, the weight's row and its gradient
        (4096, BF16, TilePlan(8192, 8192, 0)),
        (4096, FP32, TilePlan(8192, 10_752, 0)),  # 10,922 of them: 42 times 256
    ],
)
def test_tiles_of_a_gpu(width: int, dtype: torch.dtype, expected: TilePlan) -> None:
    """What is no CPU is taken for a GPU; the meta device needs none."""
    assert plan_tiles(torch.empty(20_000, width, dtype=dtype, device="meta"), 151_936, None, None) == expected


def test_spans_cover_the_length_without_overlap() -> None:
    assert list(spans(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(spans(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(spans(0, 4)) == []
