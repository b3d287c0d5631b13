"""Memory that the trainer does without while its GPU belongs to a server: gradients, and the optimizer's state.

Gradient buffers are given up as they are: their content is used up by the update, and Megatron makes them anew, zeroed. The
state (Adam's moments, fp32 weights) moves to host memory, page-locked where there is a GPU, and back. It is moved here tensor
by tensor and not by Megatron's `offload_to_cpu`, which would take the weights themselves along where shards of them are the
optimizer's parameters, and bring Adam's step counts back to the GPU, where they did not come from.

Lent tensors keep their values and their identity: a checkpoint reads them where they are.
"""

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from gtpo_megatron.policy import platform
from gtpo_megatron.policy.checkpoint.state import materialize
from gtpo_megatron.policy.memory import own_tensors
from gtpo_megatron.policy.model import Policy
from gtpo_megatron.policy.optimizer import Optimizer


class Lender:
    """Lends and takes back this rank's memory; doing either twice is doing it once. Not collective."""

    def __init__(self, policy: Policy, optimizer: Optimizer, *, state: bool = True) -> None:
        """`state`: whether the optimizer's state is on the device (`optimizer.offload: false`), and so to be lent."""
        self._policy, self._optimizer, self._state = policy, optimizer, state
        self._host: dict[
            int, Tensor
        ] = {}  # page-locked memory is slow to get: kept, by the tensor that lies there
        self._lent: list[Tensor] = []
        self.lent = False

    def lend(self) -> None:
        """Free what the device need not hold until the next step."""
        if self.lent:
            return
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=False, move_grads=True)
        if self._state:
            materialize(self._optimizer)  # made later, it would be made where its parameters are then
            self._lent = [t for t in own_tensors(self._optimizer, [self._policy]) if _on_device(t)]
            hosts = [self._host_memory(tensor) for tensor in self._lent]
            for tensor, host in zip(self._lent, hosts, strict=True):
                host.copy_(tensor.data, non_blocking=True)
            platform.synchronize()  # the copies end before what they are made of is given away
            for tensor, host in zip(self._lent, hosts, strict=True):
                tensor.data = host
        self.lent = True
        platform.give_back_cached_memory()

    def take_back(self) -> None:
        """Everything as it was before `lend`, the gradients zero."""
        if not self.lent:
            return
        for tensor in self._lent:
            tensor.data = torch.empty_like(tensor.data, device=platform.device(), pin_memory=False).copy_(
                tensor.data, non_blocking=True
            )
        self._lent = []
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=False, move_grads=True)
        platform.synchronize()
        self.lent = False

    def trim(self) -> None:
        """Give back what was used since and is free now, which the allocator would keep for later."""
        platform.give_back_cached_memory()

    def _buffers(self) -> Iterator[object]:
        for chunk in self._policy.chunks:
            if isinstance(chunk, DistributedDataParallel):
                yield from chunk.buffers + chunk.expert_parallel_buffers

    def _host_memory(self, tensor: Tensor) -> Tensor:
        host = self._host.get(id(tensor))
        if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
            host = platform.host_memory_like(tensor)
            self._host[id(tensor)] = host
        return host


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == platform.device().type
