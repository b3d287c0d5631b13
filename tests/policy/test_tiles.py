"""How the head cuts its plane: sizes worked out by hand from the workspace."""

import pytest
import torch

from gtpo_megatron.policy.head.tiles import TilePlan, plan_tiles, spans, waiting_places

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


@pytest.mark.parametrize(
    ("rows", "token_tile", "vocab_tile", "width", "waiting"),
    [
        (4, 4, 5, 4, 4),  # as many tokens as numbers in a row of the gradient: all of 4 tiles fit
        (4, 4, 5, 9, 4),
        (
            8,
            4,
            5,
            8,
            7,
        ),  # of the last columns, what their first tile's product would overwrite finds no place
        (8, 8, 5, 6, 3),  # 120 numbers for 4 tiles of 40, one of which is under the writer's feet at a time
        (8, 2, 5, 1, 2),
        (80, 80, 5, 1, 0),
    ],
)
def test_waiting_tiles_are_read_before_the_gradient_is_written_over_them(
    rows: int, token_tile: int, vocab_tile: int, width: int, waiting: int
) -> None:
    columns = 20
    plan = TilePlan(token_tile, vocab_tile, 0)
    places = waiting_places(plan, rows, columns, columns * width)
    assert len(places) == waiting
    memory: list[object] = [None] * (columns * width)

    def memory_of(tile: tuple[int, int]) -> slice:
        return slice(places[tile], places[tile] + token_tile * vocab_tile)

    for tile in places:
        assert set(memory[memory_of(tile)]) == {None}
        memory[memory_of(tile)] = [tile] * (token_tile * vocab_tile)
    for block in spans(columns, vocab_tile):
        for row in spans(rows, token_tile):
            tile = row.start, block.start
            if tile in places:
                assert set(memory[memory_of(tile)]) == {tile}
            written = slice(block.start * width, block.stop * width)
            memory[written] = ["gradient"] * (vocab_tile * width)


def test_rows_of_half_a_number_are_counted_up() -> None:
    """A bfloat16 gradient of width 3 holds 7 float32 numbers in 5 rows: after 3 of them, its first 5 are touched."""
    assert waiting_places(TilePlan(1, 3, 0), 2, 5, 7) == {(0, 3): 5, (0, 0): 2}
