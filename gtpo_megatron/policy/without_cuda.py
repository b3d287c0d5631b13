"""What stands in for CUDA where there is none, so that Megatron-Core runs unchanged on gloo and a CPU.

Megatron-Core takes a GPU for granted in a few places: literal ``device="cuda"`` arguments, streams and events, the device's
random generator, tensor type strings. Each is led to the CPU here; `policy/platform.py` decides when.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install() -> None:
    """Lead CUDA to the CPU for the life of the process."""
    _import_without_the_compiler()
    _redirect_streams()
    _redirect_random_state()
    CudaToCpu().__enter__()
    _keep_counts_on_host()
    _offload_from_the_host()


def _import_without_the_compiler() -> None:
    """Import Megatron-Core with `torch.compile` idle.

    It marks its fused kernels for the compiler, and the local layers call none of them; the mark alone loads Inductor, a
    sixth of the seconds that a rank needs to start.
    """
    with idle_compiler():
        import megatron.core.jit  # noqa: F401  keeps what it finds, for all that is imported later


def idle_compiler() -> contextlib.AbstractContextManager[object]:
    """Inside, `torch.compile` gives back what it is given."""
    return patch.object(torch, "compile", _as_it_is)


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, called or as a decorator with options, that compiles nothing."""
    return _as_it_is if function is None else function


class CudaToCpu(TorchFunctionMode):
    """Lead literal CUDA devices in torch calls to the CPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedDataParallel and the optimizer compare with "torch.cuda.FloatTensor" and the like
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _NullStream:
    """A stream or event on a device whose work is done when a call returns."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait = wait_stream = wait_event = synchronize = record = _nothing

    def record_event(self, *args: Any) -> "_NullStream":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _redirect_streams() -> None:
    stream = _NullStream()
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *a, **k: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *a, **k: stream
    torch.cuda.stream = lambda s: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = _NullStream
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *a, **k: None


def _redirect_random_state() -> None:
    """Let "the device's generator" be the default CPU generator."""
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # the generator it warns about is the same one here
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _keep_counts_on_host() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # split sizes must become host integers; upstream converts only what is_cuda
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host


class _ParametersOnGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, but for what was made of one by `cpu()`."""

    def __init__(self) -> None:
        super().__init__()
        self._host: dict[int, torch.Tensor] = {}  # by id, and held, so that no other tensor gets the id

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return id(args[0]) not in self._host
        of_host = bool(args) and id(args[0]) in self._host
        found = args[0] if func is torch.Tensor.pin_memory else func(*args, **(kwargs or {}))
        if torch.is_tensor(found) and (of_host or func is torch.Tensor.cpu):
            self._host[id(found)] = found
        return found


def _offload_from_the_host() -> None:
    """Megatron's optimizer offload copies what is on a GPU, and cannot update what is not: here it copies all the same."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    split = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def split_as_on_gpu(self: Any, offload_fraction: float) -> Any:
        with _ParametersOnGPU():
            return split(self, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_as_on_gpu
