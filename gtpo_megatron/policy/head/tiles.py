"""How the [tokens, vocabulary] plane is cut, and the matrix products of one tile."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Upper bound of what the head holds at once beside inputs, gradients and O(R): tiles and kept logits."""

CPU_TILE_BYTES = 4 << 20
"""A logits tile on a CPU: about two cores' second-level caches, where element-wise passes run 7 times faster than
from memory, and large enough for matrix products at full speed."""


@dataclass(frozen=True)
class TilePlan:
    """Tile sizes, and how many bytes of logits the forward may keep for the backward."""

    token_tile: int
    vocab_tile: int
    kept_bytes: int


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """float32 whatever the model's type; float64 stays."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def plan_tiles(hidden: Tensor, vocab_rows: int, token_tile: int | None, vocab_tile: int | None) -> TilePlan:
    """Choose what the caller left open so that tiles and operands converted for them fit in the workspace."""
    rows, width = hidden.shape
    item = statistics_dtype(hidden).itemsize
    on_cpu = hidden.device.type == "cpu"
    workspace = WORKSPACE_BYTES["cpu" if on_cpu else "cuda"]
    token_tile = min(token_tile or (1024 if on_cpu else 8192), max(rows, 1))
    # Bytes of a further column: logits and scratch (GPU: in two types), and for bfloat16 the weight's row and its gradient.
    converted = 2 * width if hidden.dtype.itemsize < item else 0
    column = ((2 if on_cpu else 3) * token_tile + converted) * item
    if vocab_tile is None:
        vocab_tile = workspace // column
        if on_cpu:
            vocab_tile = min(vocab_tile, CPU_TILE_BYTES // (token_tile * item))
        if vocab_tile > 256:  # matrix products like multiples of their own tiles
            vocab_tile -= vocab_tile % 256
    vocab_tile = max(1, min(vocab_tile, vocab_rows))
    # Kept logits save a CPU the product; a GPU recomputes faster than the memory is worth.
    return TilePlan(token_tile, vocab_tile, max(workspace - column * vocab_tile, 0) if on_cpu else 0)


def spans(length: int, tile: int) -> Iterator[slice]:
    """Consecutive slices of at most `tile` that cover [0, length)."""
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))


def waiting_places(plan: TilePlan, rows: int, columns: int, size: int) -> dict[tuple[int, int], int]:
    """Where tiles of logits may wait in the memory of the weight's gradient while the backward fills it from its start.

    By first row and column, offsets into `size` numbers of the logits' type, which hold the gradient of all columns. The
    backward goes through columns, then rows, takes a tile out and only then adds to the gradient of its columns. What
    finds no place has no entry; none has where a row of logits takes more than the whole gradient.
    """
    places = {}
    top = size
    for block in reversed(list(spans(columns, plan.vocab_tile))):
        for tile in reversed(list(spans(rows, plan.token_tile))):
            # the first tile of its columns leaves before they are written; rounded up, as halves of a number count
            written = -(-(block.stop if tile.start else block.start) * size // columns)
            start = top - (tile.stop - tile.start) * (block.stop - block.start)
            if start >= written:
                places[tile.start, block.start] = top = start
    return places


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor as the device multiplies it: GPUs take bfloat16 and give float32, CPUs need float32 factors for that."""
    return tensor if tensor.is_cuda else tensor.to(dtype)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, scale: float = 1.0) -> None:
    """out = scale * left @ right."""
    torch.addmm(out, left, right, beta=0, alpha=scale, out=out, **_wider(left, out))


def multiply_add(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out += left @ right."""
    torch.addmm(out, left, right, out=out, **_wider(left, out))


def _wider(left: Tensor, out: Tensor) -> dict[str, torch.dtype]:
    """On a GPU bfloat16 factors may have a float32 product, accumulated in it."""
    return {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
