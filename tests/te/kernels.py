"""PyTorch functions under the names of transformer_engine_torch: products, norms, rotary embedding, packed rows, Adam."""

from typing import Any

import torch
from torch import Tensor

from tests.te.formats import DTYPES, FLOAT8, quantize

__all__ = [
    "bgrad_quantize",
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "fused_rope_backward",
    "fused_rope_forward",
    "generic_gemm",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
]


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """op(B) @ op(A) in float32 (column-major, as cuBLAS has it): [D, bias gradient, None, extra output]."""
    if gelu or comm_overlap is not None:
        raise NotImplementedError("GEMM with GELU or with overlapped communication")
    a, b = _operand(A, not transa), _operand(B, transb)
    for values, raw in ((a, A), (b, B)):
        # cuBLAS refuses FP8 operands whose leading dimension is not a multiple of 16 bytes
        if hasattr(raw, "_quantizer") and (values.shape[0] % 16 or values.shape[1] % 16):
            raise ValueError(f"FP8 operand of shape {tuple(values.shape)}: not multiples of 16")
    out = alpha * (b.t() if transb else b) @ (a.t() if transa else a)
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.sum(0).to(DTYPES[int(bias_type)])
        else:
            out = out + bias.float()
    if not transb:
        shape = B.size() if hasattr(B, "_quantizer") else B.shape
        out = out.reshape(*shape[:-1], out.shape[-1])
    dtype = DTYPES[int(out_dtype)] if out_dtype is not None else getattr(A, "dtype", None) or A._dtype
    if quantizer is not None:
        result = quantize(out.to(dtype), quantizer, D)
    elif D is None:
        result = out.to(dtype)
    else:
        out = out.reshape(D.shape)
        result = D.copy_(D.float() + out if accumulate else out)
    return [result, bias_grad, None, extra_output]


def _operand(x: Any, transposed: bool) -> Tensor:
    """float32 [rows, columns]; of a block-scaled tensor, the copy that the product would read."""
    if getattr(x, "_is_2D_scaled", None) is not None and transposed and x._columnwise_data is not None:
        kept, x._rowwise_data = x._rowwise_data, None
        value = x.dequantize(dtype=torch.float32)
        x._rowwise_data = kept
    elif hasattr(x, "_quantizer"):
        value = x.dequantize(dtype=torch.float32)
    else:
        value = x.detach().float()
    return value.reshape(-1, value.shape[-1])


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, otype: Any, margin: int, centered: bool
) -> list[Any]:
    """[normed, None, 1 / rms]"""
    values = x.float()
    inverse = torch.rsqrt(values.pow(2).mean(-1) + eps)
    normed = (values * inverse.unsqueeze(-1) * (weight.float() + centered)).to(DTYPES[int(otype)])
    if quantizer is not None:
        normed = quantize(normed, quantizer, out)
    elif out is not None:
        normed = out.copy_(normed)
    return [normed, None, inverse]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, inverse: Tensor, gamma: Tensor, margin: int, centered: bool
) -> list[Tensor]:
    """[gradient of x, gradient of gamma]"""
    values, gradient = x.float(), dz.float().reshape(x.shape)
    normed = values * inverse.unsqueeze(-1)
    g = gradient * (gamma.float() + centered)
    dx = inverse.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True))
    dgamma = (gradient * normed).reshape(-1, x.shape[-1]).sum(0)
    return [dx.to(x.dtype), dgamma.to(gamma.dtype)]


def bgrad_quantize(grad: Tensor, quantizer: Any) -> list[Any]:
    """[bias gradient, the gradient in FP8]"""
    bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(grad.dtype)
    return [bias, quantize(grad, quantizer)]


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    transposed = data.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Delayed scaling: new scales from the histories of largest values, which then move on by one."""
    start, largest = 0, torch.finfo(FLOAT8[int(dtype)]).max
    for history, scale in zip(histories, scales, strict=True):
        end = start + history.shape[1]
        history[0].copy_(buffer[start:end])
        start = end
        amax = history[0].clone() if algorithm == "most_recent" else history.amax(0)
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        usable = (amax > 0) & torch.isfinite(amax)
        scale.copy_(torch.where(usable, largest / amax / 2**margin, scale))


def convert_thd_to_bshd(packed: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    grid = packed.new_zeros(batch, longest, *packed.shape[1:])
    for i, (start, end) in enumerate(_spans(cu_seqlens)):
        grid[i, : end - start] = packed[start:end]
    return grid


def convert_bshd_to_thd(grid: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    packed = grid.new_zeros(tokens, *grid.shape[2:])
    for i, (start, end) in enumerate(_spans(cu_seqlens)):
        packed[start:end] = grid[i, : end - start]
    return packed


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def fused_rope_forward(*args: Any) -> Tensor:
    return _rotated(*args, sign=1)


def fused_rope_backward(*args: Any) -> Tensor:
    return _rotated(*args, sign=-1)


def _rotated(
    t: Tensor,
    freqs: Tensor,
    start: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    *,
    sign: int,
) -> Tensor:
    if interleaved or start is not None or cu_seqlens is None:
        raise NotImplementedError("rotary embedding other than of packed sequences")
    positions = torch.cat([_positions(end - begin, cp_size, cp_rank) for begin, end in _spans(cu_seqlens)])
    angles = freqs[positions].reshape(len(positions), 1, -1)
    covered, width = len(positions), angles.shape[-1]
    x = t[:covered, :, :width].float()
    first, second = x.chunk(2, -1)
    out = torch.zeros_like(t, memory_format=torch.contiguous_format)
    turned = x * angles.cos() + sign * torch.cat((-second, first), -1) * angles.sin()
    out[:covered, :, :width] = turned.to(t.dtype)
    out[:covered, :, width:] = t[:covered, :, width:]
    return out


def _positions(length: int, ranks: int, rank: int) -> Tensor:
    """Of one sequence, what a rank of context parallelism holds: the chunk of its number from the front and from the back."""
    chunks = torch.arange(length).split(length // (2 * ranks)) if ranks > 1 else [torch.arange(length)]
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if ranks > 1 else chunks[0]


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: Tensor) -> None:
    multi_tensor_scale(chunk, noop, lists, float(scale))


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: bool,
    decay: float,
) -> None:
    """lists: gradients, parameters, first and second moments[, fp32 copies]; mode 1 decouples the decay (AdamW)."""
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, param, m, v, *main in zip(*lists, strict=True):
        p, g = (main[0] if main else param).float(), grad.float()
        if mode == 0:
            g = g + decay * p
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / c1) / ((v / c2).sqrt() + eps)
        p = p - lr * (update + (decay * p if mode == 1 else 0))
        for target in (*main, param):
            target.copy_(p)
