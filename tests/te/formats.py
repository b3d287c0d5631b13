"""FP8 values by PyTorch's float8 types: scales per tensor (delayed, current) and per block, as transformer_engine_torch
names the functions. Rounding and saturation are the formats' own, so the values are exact."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}  # by the extension's DType
DTYPES = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16} | FLOAT8
BLOCK = 128

__all__ = [
    "compute_amax",
    "create_empty_quantized_tensor",
    "dequantize",
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
    "multi_tensor_compute_scale_and_scale_inv",
    "quantize",
]


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False
) -> Any:
    """Memory for what `quantizer` makes of a tensor."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    shape, describer = tuple(shape), quantizer
    if isinstance(quantizer, Float8Quantizer):
        # delayed scaling has the same layout in memory, but only the other class describes it in Python
        describer = Float8CurrentScalingQuantizer(
            quantizer.dtype, device, rowwise=quantizer.rowwise_usage, columnwise=quantizer.columnwise_usage
        )
        describer.internal = quantizer.internal
    description = describer.create_metadata(shape, dtype=dtype)
    description["nontensor_kwargs"]["quantizer"] = quantizer
    stride = torch.empty(shape, device="meta").stride()
    tensors = describer.alloc_tensors(shape, device=device)
    return QuantizedTensorStorage.__tensor_unflatten__(tensors, description, shape, stride)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` in FP8, into `output` if given."""
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device)
    if noop is None or not noop.item():
        values = tensor.detach().float()
        (_fill_blocks if hasattr(output, "_rowwise_data") else _fill_tensor)(values, quantizer, output)
    return output


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return tensor.dequantize(dtype=DTYPES[int(dtype)])


# ------------------------------------------------------------------ weights of which a rank has a part


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], largest: float, powers_of_two: bool, epsilon: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, largest, powers_of_two, epsilon))
        inverse.copy_(1 / scale)


def fp8_block_scaling_compute_partial_amax(
    part: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
) -> None:
    """`part`: flat, from element `start` on of a weight [height, width]; `amax`: [blocks down, blocks across]."""
    whole = part.new_zeros(height * width, dtype=torch.float32)
    whole[start : start + part.numel()] = part.abs().flatten()
    padded = torch.nn.functional.pad(whole.view(height, width), (0, -width % block, 0, -height % block))
    found = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block).amax((1, 3))
    amax.zero_()
    amax[: found.shape[0], : found.shape[1]] = found


def fp8_block_scaling_partial_cast(
    part: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    """The same part as bytes of FP8, by the scale of each block."""
    wide = scale.repeat_interleave(block, 0)[:height].repeat_interleave(block, 1)[:, :width]
    scales = wide.reshape(-1)[start : start + part.numel()]
    out.copy_(_rounded(part.flatten().float() * scales, FLOAT8[int(dtype)]).view(out.shape))


# ------------------------------------------------------------------ whole tensors


def _fill_tensor(values: Tensor, quantizer: Any, output: Any) -> None:
    float8 = FLOAT8[int(quantizer.dtype)]
    amax = values.abs().max() if values.numel() else values.new_zeros(())
    if hasattr(
        quantizer, "scale"
    ):  # delayed: the scale comes from earlier passes, the amax is for later ones
        scale = quantizer.scale
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        if getattr(quantizer, "with_amax_reduction", False):
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = _scale_of(quantizer, amax.reshape(1))
    output._scale_inv.copy_(1 / scale)
    data = _rounded(values * scale, float8)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(data.movedim(-1, 0))
        output._transpose_invalid = False


def _fill_blocks(values: Tensor, quantizer: Any, output: Any) -> None:
    flat = values.reshape(-1, values.shape[-1])
    if output._rowwise_data is not None:
        data = _in_blocks(flat, quantizer, output._rowwise_scale_inv)
        output._rowwise_data.copy_(data.view(values.shape))
    if output._columnwise_data is not None:
        data = _in_blocks(flat.t().contiguous(), quantizer, output._columnwise_scale_inv)
        output._columnwise_data.copy_(data.view(output._columnwise_data.shape))


def _in_blocks(values: Tensor, quantizer: Any, scales: Tensor) -> Tensor:
    """[m, k] -> uint8 [m, k] in blocks of 1 x 128 or 128 x 128, whose inverse scales go to `scales`."""
    float8, (m, k) = FLOAT8[int(quantizer.dtype)], values.shape
    rows = BLOCK if quantizer.block_scaling_dim == 2 else 1
    padded = torch.nn.functional.pad(values, (0, -k % BLOCK, 0, -m % rows))
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale_of(quantizer, tiles.abs().amax((1, 3)))
    data = _rounded(tiles * scale[:, None, :, None], float8).reshape(padded.shape)[:m, :k]
    inverse = 1 / scale if rows == BLOCK else (1 / scale).t()  # scales of vectors lie block after block
    scales.zero_()
    scales[: inverse.shape[0], : inverse.shape[1]] = inverse
    return data


def _scale_of(quantizer: Any, amax: Tensor) -> Tensor:
    largest = torch.finfo(FLOAT8[int(quantizer.dtype)]).max
    powers_of_two = getattr(quantizer, "force_pow_2_scales", False)
    return _scale(amax, largest, powers_of_two, getattr(quantizer, "amax_epsilon", 0.0))


def _scale(amax: Tensor, largest: float, powers_of_two: bool, epsilon: float) -> Tensor:
    """What brings `amax` to the format's largest value; 1 where it is zero or not finite."""
    amax = amax.clamp_min(epsilon)
    usable = (amax > 0) & torch.isfinite(amax)
    scale = torch.where(usable, largest / amax, torch.ones_like(amax))
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    return torch.exp2(torch.floor(torch.log2(scale))) if powers_of_two else scale


def _rounded(values: Tensor, float8: torch.dtype) -> Tensor:
    largest = torch.finfo(float8).max
    return values.clamp(-largest, largest).to(float8).view(torch.uint8)  # the kernels saturate
