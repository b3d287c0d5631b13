"""What mixtures of experts ask of Transformer Engine: grouped products, and tokens put in the order of their experts.

The permutations are Triton kernels in Transformer Engine; these do what its documentation says of them.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.te.formats import quantize
from tests.te.kernels import generic_gemm

__all__ = [
    "fused_multi_row_padding",
    "fused_multi_row_unpadding",
    "get_num_cublas_streams",
    "split_quantize",
    "te_general_grouped_gemm",
]


def install(permutation: ModuleType) -> None:
    """Put the permutations into `transformer_engine.pytorch.permutation`, before anything imports them from it."""
    permutation.moe_permute = permute
    permutation.moe_permute_with_probs = permute_with_probs
    permutation.moe_unpermute = unpermute
    permutation.moe_sort_chunks_by_index = sort_chunks
    permutation.moe_sort_chunks_by_index_with_probs = sort_chunks_with_probs


def permute(tokens: Tensor, routing: Tensor, num_out_tokens: int = -1) -> tuple[Tensor, Tensor]:
    """tokens [n, h], routing [n, experts] -> tokens of each expert after the other, and [2, m] where they came from."""
    places = routing.bool().t().nonzero().t()  # rows: expert, token
    if num_out_tokens not in (-1, places.shape[1]):
        raise NotImplementedError("tokens that are dropped")
    return tokens[places[1]], places


def permute_with_probs(
    tokens: Tensor, probs: Tensor, routing: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """`permute`, with the router's weight [m] of each."""
    permuted, places = permute(tokens, routing, num_out_tokens)
    return permuted, probs[places[1], places[0]], places


def unpermute(
    permuted: Tensor,
    places: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: Any = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """The sum, over experts, of what became of each token: [n, h]."""
    if pad_offsets is not None:
        raise NotImplementedError("experts whose tokens are padded by the permutation")
    if merging_probs is not None:
        permuted = permuted * merging_probs[places[1], places[0]].unsqueeze(1)
    return permuted.new_zeros(restore_shape).index_add(0, places[1], permuted)


def sort_chunks(tokens: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    """Pieces of the given sizes in another order."""
    pieces = tokens.split(sizes.tolist())
    return torch.cat([pieces[i] for i in order.tolist()])


def sort_chunks_with_probs(
    tokens: Tensor, probs: Tensor, sizes: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """`sort_chunks` of both."""
    return sort_chunks(tokens, sizes, order), sort_chunks(probs, sizes, order)


def fused_multi_row_padding(tokens: Tensor, out: Tensor, sizes: list[int], padded: list[int]) -> None:
    """Each expert's rows into `out`, followed by as many of zeros as it asks for."""
    for rows, place in zip(tokens.split(sizes), out.split(padded), strict=True):
        place.zero_()
        place[: len(rows)] = rows


def fused_multi_row_unpadding(tokens: Tensor, out: Tensor, padded: list[int], sizes: list[int]) -> None:
    """Each expert's rows into `out`, without what padded them."""
    for rows, place in zip(tokens.split(padded), out.split(sizes), strict=True):
        place.copy_(rows[: len(place)])


def get_num_cublas_streams() -> int:
    return 1


def split_quantize(
    tensor: Tensor, sizes: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """Each piece in FP8 by its own quantizer."""
    return [quantize(part, own) for part, own in zip(tensor.split(list(sizes)), quantizers, strict=True)]


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: list[int] | None,
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu: list[Tensor],
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> list[Tensor]:
    """The product of each expert, into `out` (one tensor for all of them if `single_output`). An empty one is zero."""
    results = list(out[0].split(m_splits)) if single_output else out
    for i, (a, b, result) in enumerate(zip(A, B, results, strict=True)):
        rows = b.size(0)
        if rows == 0:
            if result.numel() and not accumulate:
                result.zero_()
            continue
        _, bias_grad, *_ = generic_gemm(
            a, transa, b, transb, result, None, out_dtype, bias[i], bias_type, False, None, grad, None, 0,
            accumulate, use_split_accumulator,
        )  # fmt: skip
        if grad and bias[i].numel():
            bias[i].copy_(bias_grad)
    return bias
