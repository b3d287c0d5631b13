"""Attention over packed rows as cuDNN does it for Transformer Engine, and what context parallelism makes of parts of it.

Shapes: q [t, h, d], k and v [s, g, d] (h a multiple of g), softmax statistics [t, h, 1] in float32. `bounds` are cumulative
lengths [sequences + 1]; the padded ones say where a sequence begins. A rank of context parallelism holds two chunks of every
sequence, one after the other: its first and its second half.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "fused_attn_bwd",
    "fused_attn_fwd",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
]
CAUSAL = {"NVTE_PADDING_MASK": False, "NVTE_PADDING_CAUSAL_MASK": True}


def install(context_parallel: ModuleType) -> None:
    """Let the exchanges of keys and values be waited for twice: NCCL's can be, gloo's second wait never ends."""
    exchange = context_parallel.flash_attn_p2p_communicate

    def waited_once(*args: Any) -> list[_Once]:
        return [_Once(request.wait) for request in exchange(*args)]

    context_parallel.flash_attn_p2p_communicate = waited_once


class _Once:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait: Callable[[], Any] | None = wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None


def fused_attn_fwd(
    max_q: int,
    max_kv: int,
    training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    out_format: Any,
    scale_inv_format: Any,
    bias_type: Any,
    mask: Any,
    softmax: Any,
    window: tuple[int, int],
    bottom_right: bool,
    bounds_q: Tensor,
    bounds_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """[output [t, h, d], log of the sum of exponentials [t, h, 1], state of the random generator]"""
    _check(layout, bias_type, softmax, dropout, window)
    out, statistics = torch.zeros_like(q), q.new_zeros(*q.shape[:2], 1, dtype=torch.float32)
    for rows, columns in _sequences(bounds_q, bounds_kv, padded_q, padded_kv):
        scores = _scores(q[rows], k[columns], scale, CAUSAL[mask.name])
        logs = scores.logsumexp(-1, keepdim=True)
        values = (scores - logs).exp() @ _heads(v[columns], q.shape[1])
        out[rows], statistics[rows] = values.transpose(0, 1).to(q.dtype), logs.transpose(0, 1)
    return [out, statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    out_format: Any,
    grad_format: Any,
    grad_layout: Any,
    scale_inv_format: Any,
    grad_scale_inv_format: Any,
    bias_type: Any,
    mask: Any,
    softmax: Any,
    window: tuple[int, int],
    bottom_right: bool,
    deterministic: bool,
    bounds_q: Tensor,
    bounds_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    fake_dtype: torch.dtype,
    saved: list[Tensor],
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """[gradients of q, k, v, and of the bias and the softmax's offset, which are not there]

    `saved[0]` and `out` may be those of the whole attention, of which the keys given here are a part: so it is asked of it.
    """
    _check(layout, bias_type, softmax, dropout, window)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in _sequences(bounds_q, bounds_kv, padded_q, padded_kv):
        keys, values = (_heads(x[columns], q.shape[1]) for x in (k, v))
        query, own, gradient = (x[rows].float().transpose(0, 1) for x in (q, out, grad))
        scores = _scores(q[rows], k[columns], scale, CAUSAL[mask.name])
        weights = (scores - saved[0][rows].transpose(0, 1)).exp()
        inner = weights * (gradient @ values.mT - (gradient * own).sum(-1, keepdim=True))
        dq[rows] = (scale * inner @ keys).transpose(0, 1).to(q.dtype)
        dk[columns] = _groups(scale * inner.mT @ query, k).to(k.dtype)
        dv[columns] = _groups(weights.mT @ gradient, v).to(v.dtype)
    return [dq, dk, dv, None, None]


def _check(layout: Any, bias_type: Any, softmax: Any, dropout: float, window: tuple[int, int]) -> None:
    packed, plain = layout.name.startswith("NVTE_T"), bias_type.name == "NVTE_NO_BIAS" and dropout == 0.0
    if not packed or not plain or softmax.name != "NVTE_VANILLA_SOFTMAX" or window[0] != -1:
        raise NotImplementedError("attention other than of packed rows, without bias, dropout and window")


def _sequences(
    bounds_q: Tensor, bounds_kv: Tensor, padded_q: Tensor | None, padded_kv: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Where each sequence's queries and keys lie."""
    starts = bounds_q if padded_q is None else padded_q, bounds_kv if padded_kv is None else padded_kv
    lengths = bounds_q.diff().tolist(), bounds_kv.diff().tolist()
    for q, n, kv, m in zip(starts[0].tolist(), lengths[0], starts[1].tolist(), lengths[1], strict=False):
        yield slice(q, q + n), slice(kv, kv + m)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """[h, n, m] in float32."""
    scores = scale * q.float().transpose(0, 1) @ _heads(k, q.shape[1]).mT
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if causal else scores


def _heads(x: Tensor, heads: int) -> Tensor:
    """[m, g, d] -> [heads, m, d] in float32, each group for as many heads as share it."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _groups(gradient: Tensor, like: Tensor) -> Tensor:
    """[h, m, d] -> [m, g, d]: the sum over the heads that share a group."""
    return gradient.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)


def _halves(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Places of all sequences' first and second halves on this rank."""
    first, second = [], []
    bounds = padded.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        middle = (start + end) // 2
        first.append(torch.arange(start, middle))
        second.append(torch.arange(middle, end))
    return torch.cat(first), torch.cat(second)


def thd_read_half_tensor(x: Tensor, padded: Tensor, half: int) -> Tensor:
    """[t, ...] -> [t / 2, ...]"""
    return x[_halves(padded)[half]]


def thd_read_second_half_lse(lse: Tensor, padded: Tensor, packed: bool, length: int) -> Tensor:
    """Statistics [h, t] -> [h, t / 2]"""
    _only_packed(packed)
    return lse[:, _halves(padded)[1]]


def thd_second_half_lse_correction(lse: Tensor, part: Tensor, padded: Tensor, packed: bool) -> None:
    """Statistics [h, t] of what has been summed up take in those [h, t / 2] of more keys for the second halves."""
    _only_packed(packed)
    second = _halves(padded)[1]
    lse[:, second] = torch.logaddexp(lse[:, second], part)


def thd_out_correction(
    out: Tensor,
    part: Tensor,
    before: Tensor,
    after: Tensor,
    lse: Tensor,
    padded: Tensor,
    half: bool,
    packed: bool,
) -> None:
    """The output [t, h, d] so far takes in what more keys gave (statistics `lse`), to all its rows or the second halves."""
    _only_packed(packed)
    rows = _halves(padded)[1] if half else torch.arange(int(padded[-1]))
    kept, added = ((x - after[:, rows]).exp().t()[..., None] for x in (before[:, rows], lse))
    out[rows] = (out[rows] * kept + part * added).to(out.dtype)


def thd_grad_correction(grad: Tensor, part: Tensor, padded: Tensor, first: str, second: str) -> None:
    """A gradient [t, h, d] takes in a part of it: to each half it is added, or copied, or not there."""
    whole = {first, second} <= {"add", "copy"}
    for rows, how in zip(_halves(padded), (first, second), strict=True):
        if how == "zero":
            grad[rows] = 0
        elif how != "none":
            own = part[rows] if whole else part
            grad[rows] = grad[rows] + own if how == "add" else own


def _only_packed(packed: bool) -> None:
    if not packed:
        raise NotImplementedError("softmax statistics that are not packed")
