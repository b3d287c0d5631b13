"""The machine: everything that differs between CUDA and a CPU stands in this module, and nowhere else.

With CUDA, `install()` does nothing. Without, Megatron-Core runs unchanged on gloo once the few places where it takes CUDA
for granted are led to the CPU: literal ``device="cuda"`` arguments, streams and events, the device's random generator,
tensor type strings, and three bugs of its paths without Transformer Engine. Each redirection says what needs it.
"""

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import resource
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from gtpo_megatron import control
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine import probe

log = logging.getLogger(__name__)
DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"  # Transformer Engine's switch
HAS_CUDA = torch.cuda.is_available()
_CPU = torch.device("cpu")
_installed = False


def device() -> torch.device:
    """The device of this rank's parameters and activations."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else _CPU


def backend() -> str:
    """The torch.distributed backend of the model-parallel groups."""
    return "nccl" if HAS_CUDA else "gloo"


def synchronize() -> None:
    """Wait for the device, so that host clocks tell the truth."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: the allocator's on CUDA, resident set on CPU."""
    if HAS_CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_state() -> torch.Tensor:
    """State of the device's random generator, on the host; without CUDA that of torch's own."""
    return torch.cuda.get_rng_state().cpu() if HAS_CUDA else torch.get_rng_state()


def set_random_state(state: torch.Tensor) -> None:
    """Put back what `random_state` returned."""
    if HAS_CUDA:
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's PyTorch layers can be used: all its parts and a GPU."""
    return HAS_CUDA and all(probe.transformer_engine_parts())


def use_transformer_engine(wanted: Literal["auto", "local", "transformer_engine"]) -> bool:
    """Whether to build the policy of Transformer Engine's layers; the choice and its reason go to the log.

    Raises:
        UserError: they are wanted and cannot be used here.
    """
    usable = has_transformer_engine()
    if usable:
        reason = "it is installed, and there is a GPU"
    elif not probe.transformer_engine_parts()[0]:
        reason = "it is not installed"
    else:
        reason = probe.transformer_engine_fault() or "there is no CUDA GPU"
    if wanted == "transformer_engine" and not usable:
        raise UserError(f"model.layers: transformer_engine needs Transformer Engine and a GPU: {reason}")
    chosen = usable and wanted != "local"
    why = f"Transformer Engine: {reason}" if wanted == "auto" else "asked for"
    log.info(
        "model.layers: %s takes %s layers (%s)",
        wanted,
        "Transformer Engine's" if chosen else "the local",
        why,
    )
    return chosen


def use_fused_weight_gradient() -> bool:
    """Whether the product that gives a weight's gradient adds it to the gradient buffer itself; said in the log on GPUs.

    It saves the gradient's own tensor and a pass over it. Megatron-Core does it by apex's kernel, and Transformer Engine's
    layers by their own; both only where apex's is found, because Megatron-Core's output layer cannot be built otherwise.
    """
    if not HAS_CUDA:
        return False
    found = importlib.util.find_spec(probe.FUSED_WEIGHT_GRADIENT) is not None
    log.info(
        "weight gradients are %s (apex's %s is %s)",
        "added to their buffer by the product itself" if found else "made, then added to their buffer",
        probe.FUSED_WEIGHT_GRADIENT,
        "installed" if found else "not installed",
    )
    return found


def use_deterministic_kernels() -> None:
    """Let Transformer Engine take deterministic attention kernels alone. Call before its layers are built.

    Megatron-Core's deterministic mode refuses to build Transformer Engine's attention otherwise.
    """
    before = os.environ.get(DETERMINISM)
    os.environ[DETERMINISM] = "0"
    if before != "0":
        log.info(
            "training.deterministic: true sets %s=0 (before: %s); attention takes slower kernels",
            DETERMINISM,
            before or "not set",
        )


def install() -> None:
    """Make megatron.core importable and runnable here. Call before anything imports it; calling again does nothing.

    Raises UserError where an incomplete Transformer Engine would break that import.
    """
    global _installed
    if _installed:
        return
    if fault := probe.transformer_engine_fault():
        raise UserError(fault)
    _installed = True
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    # `gtpo-megatron doctor` says what is missing; megatron would say it on every rank of every start
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    if HAS_CUDA:
        return
    _redirect_streams()
    _redirect_random_state()
    _stand_in_for_paged_stash()
    CudaToCpu().__enter__()  # for the life of the process
    _mend_moe()
    _mend_distributed_optimizer()


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


def _stand_in_for_paged_stash() -> None:
    """megatron-core >= 0.17 imports Triton through this one module even where no kernel of it is called."""
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is not None or name in sys.modules:
        return
    module = types.ModuleType(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the paged stash of megatron-core's MoE layers needs triton")

    def getattribute(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return missing

    module.__getattr__ = getattribute  # type: ignore[method-assign]
    sys.modules[name] = module


def _mend_moe() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 reads a name that it only defines with Transformer Engine

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # split sizes must become host integers; upstream converts only what is_cuda
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _mend_distributed_optimizer() -> None:
    """torch's AdamW keeps a step per parameter, which upstream restores elsewhere and then misses here."""
    import megatron.core.optimizer.distrib_optimizer as module

    if module.HAVE_APEX_OR_TE:
        return
    original = module.DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                state["step"] = state[
                    "step"
                ].clone()  # upstream shares one step tensor between all parameters
                tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


@contextlib.contextmanager
def importing_bridge() -> Iterator[None]:
    """Let `import megatron.bridge` succeed without Transformer Engine, which some of its modules import at their top.

    The stand-ins are in sys.modules only inside the context, and only after megatron.core has looked for the real
    package, so no code takes them for an installed Transformer Engine.
    """
    if has_transformer_engine():
        yield
        return
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.transformer.moe.moe_layer  # noqa: F401

    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    if importlib.util.find_spec("triton") is None:
        names += ["triton", "triton.language"]
    stand_ins = {name: _stand_in(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def _stand_in(name: str) -> MagicMock:
    module = MagicMock(name=name)
    module.__path__, module.__name__, module.__version__ = [], name, "0.0.0"
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def init_process_group() -> None:
    """Join the launcher's world, or make a world of one, with its control group. On CUDA each rank takes its LOCAL_RANK's
    GPU, or the only one that Slurm lets it see (--gpus-per-task=1).
    """
    if dist.is_initialized():
        return
    if HAS_CUDA:
        bound = torch.cuda.device_count() == 1
        torch.cuda.set_device(0 if bound else int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend(), timeout=control.STEP_LIMIT)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    control.group()
