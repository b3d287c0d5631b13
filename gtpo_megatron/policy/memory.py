"""Bytes that this rank holds of a policy and its optimizer, by part: read off the tensors that there are."""

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from gtpo_megatron.policy.model import Policy
from gtpo_megatron.policy.optimizer import Optimizer


def held_bytes(policies: Sequence[Policy], optimizer: Optimizer) -> dict[str, int]:
    """Bytes of `weights` (of all the policies), `gradients`, and `optimizer`, which makes its moments at the first update.

    FP8 weights count with the two bytes of the type that they stand for. Activations and what kernels and NCCL take are in
    the peak alone.
    """
    modules = [module for policy in policies for module in policy.modules]
    wrapped = [c for policy in policies for c in policy.chunks if isinstance(c, DistributedDataParallel)]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "weights": sum(_size(p) for module in modules for p in module.parameters()),
        "gradients": sum(_size(buffer.grad_data) for buffer in buffers),
        "optimizer": sum(_size(tensor) for tensor in own_tensors(optimizer, policies)),
    }


def own_tensors(optimizer: Optimizer, policies: Sequence[Policy]) -> list[Tensor]:
    """Moments, and the copies of weights in float32; shards that are views of the weights themselves are not its own."""
    weights = {_place(p) for policy in policies for module in policy.modules for p in module.parameters()}
    found: list[Tensor] = []
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        inner = part.optimizer
        if inner is None:  # a rank without a share of these parameters
            continue
        own = (p for group in inner.param_groups for p in group["params"] if _place(p) not in weights)
        state = (value for values in inner.state.values() for value in values.values())
        found += [tensor for tensor in [*own, *state] if isinstance(tensor, Tensor)]
    return found


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
