"""Conflict runs: how far each completion agrees, token by token, with completions of the opposite sign (section 2)."""

import torch
from torch import Tensor

from gtpo_megatron.algorithm._checks import check_all, check_integers, check_lengths, check_shape

FIRST_WIDTH = 8  # positions of the first block; runs are short in practice
# Tokens of a block at most (or one position of every open group). A block fits a core's cache, and its operations stay below
# the size from which PyTorch splits them over threads, which costs more than it gains, the more so on a busy machine.
BLOCK_TOKENS = 1 << 14


def conflict_runs(
    token_ids: Tensor, lengths: Tensor, advantages: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Lengths of the two unbroken runs of conflict tokens of each completion.

    prefix_i is the largest a such that at every position t < a some completion of the same group and of the opposite sign
    of advantage, longer than t, has the same token; suffix_i is the same counted from the ends. Different positions may be
    matched by different completions. Both are 0 where the advantage is 0.

    Positions are read in blocks of growing width, forwards and backwards at once; a group leaves as soon as all its runs
    have ended. Time and extra memory depend on the lengths of the runs, not on L nor on the vocabulary: a block holds at
    most 16,384 tokens (or one of each open completion), and each is compared with one token of the opposite sign at a time.

    Args:
        token_ids: [N, L] integers; what stands beyond a completion's length is never looked at.
        lengths: [N] integers from 1 to L.
        advantages: [N]; only their signs are used.
        group_ids: [N] integers in any order; groups may differ in size.

    Returns:
        prefix [N] and suffix [N], int64, in tokens.

    Raises:
        ValueError: a wrong shape or type, a length of 0 or beyond L, a NaN advantage; with the argument and the index.
    """
    _check(token_ids, lengths, advantages, group_ids)
    count = token_ids.shape[0]
    runs = torch.zeros(2 * count, dtype=torch.int64, device=token_ids.device)
    row, group, opposite, opposites = _contested(advantages, group_ids)

    # From here on a "line" is one completion read in one direction: first all forwards, then all backwards.
    lines = row.numel()
    line = torch.cat([row, row + count])
    group = torch.cat([group, group + count])
    opposite = torch.cat([opposite, opposite + lines])
    row, opposites, length = row.repeat(2), opposites.repeat(2), lengths.long()[row].repeat(2)
    running = torch.ones_like(row, dtype=torch.bool)

    start, width = 0, FIRST_WIDTH
    while row.numel():
        width = min(width, max(1, BLOCK_TOKENS // row.numel()))
        block, inside = _read(token_ids, row, length, line >= count, start, width)
        query = running.nonzero().squeeze(1)
        agreed = _matches(block, inside, query, opposite, opposites).cumprod(1, dtype=torch.uint8).sum(1)
        runs.index_add_(0, line.index_select(0, query), agreed)
        running.index_copy_(0, query, agreed == width)

        # A completion whose own run has ended still matches others: lines stay until the runs of their group have ended.
        is_open = torch.zeros_like(runs, dtype=torch.bool).index_fill_(0, group.masked_select(running), True)
        keep = is_open.index_select(0, group)
        if not bool(keep.all()):
            kept = keep.nonzero().squeeze(1)
            opposite = (keep.cumsum(0) - 1).index_select(0, opposite)
            state = line, row, group, opposite, opposites, length, running
            line, row, group, opposite, opposites, length, running = (x.index_select(0, kept) for x in state)
        start, width = start + width, 2 * width
    return runs[:count], runs[count:]


def _contested(advantages: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Completions of groups that hold both signs, ordered by group and sign, so that an opposite side is a range of them.

    Returns:
        Four int64 tensors of one length: the completion's row; its group, numbered below the number of completions with an
        advantage other than 0; the first completion of its opposite side; how many stand on that side.
    """
    row = (advantages != 0).nonzero().squeeze(1)
    groups, group = group_ids[row].unique(return_inverse=True)
    side = 2 * group + (advantages[row] > 0)
    size = side.new_zeros(2 * groups.numel()).index_add_(0, side, torch.ones_like(side))
    contested = size[side ^ 1] > 0
    side, order = side[contested].sort(stable=True)
    size = size * (size.view(-1, 2).flip(1).flatten() > 0)
    first = size.cumsum(0) - size
    return row[contested][order], side // 2, first[side ^ 1], size[side ^ 1]


def _read(
    token_ids: Tensor, row: Tensor, length: Tensor, backwards: Tensor, start: int, width: int
) -> tuple[Tensor, Tensor]:
    """Positions start..start+width-1 of each line, counted from its own end if it goes backwards.

    Returns:
        The tokens, whatever stands there beyond the length, and whether a position is inside it: both [lines, width].
    """
    position = torch.arange(start, start + width, device=row.device).expand(row.numel(), width)
    inside = position < length.unsqueeze(1)
    column = torch.where(backwards.unsqueeze(1), length.unsqueeze(1) - 1 - position, position)
    # token_ids[row, column], written as index_select over its memory: indexing with [] goes to several threads even where
    # the block is small.
    down, right = token_ids.stride()
    extent = (token_ids.shape[0] - 1) * down + (token_ids.shape[1] - 1) * right + 1
    place = row.unsqueeze(1) * down + column.masked_fill_(~inside, 0) * right
    memory = token_ids.as_strided((extent,), (1,))
    return memory.index_select(0, place.flatten()).view_as(place), inside


def _matches(block: Tensor, inside: Tensor, query: Tensor, opposite: Tensor, opposites: Tensor) -> Tensor:
    """Whether each token of the lines `query` is met on the opposite side: bool [lines of query, width]."""
    tokens, outside = block.index_select(0, query), ~inside.index_select(0, query)
    first, last = opposite.index_select(0, query), opposites.index_select(0, query) - 1
    met = outside.clone()
    for k in range(int(last.max()) + 1):
        other = first + last.clamp(max=k)
        met |= (block.index_select(0, other) == tokens) & inside.index_select(0, other)
        if bool(met.all()):  # identical completions: the first comparison is enough
            break
    return met & ~outside


def _check(token_ids: Tensor, lengths: Tensor, advantages: Tensor, group_ids: Tensor) -> None:
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids must have shape [N, L], not {list(token_ids.shape)}")
    check_integers("token_ids", token_ids)
    count, max_length = token_ids.shape
    check_lengths(lengths, count, max_length)
    check_shape("advantages", advantages, (count,), "[N]")
    check_all("advantages", advantages, ~advantages.isnan(), "its sign must be known")
    check_shape("group_ids", group_ids, (count,), "[N]")
    check_integers("group_ids", group_ids)
