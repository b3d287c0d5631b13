"""The machine: everything that differs between CUDA and a CPU is decided in this module, and nowhere else.

With Transformer Engine and a GPU, `install()` changes nothing. Without Transformer Engine it mends what Megatron-Core's
paths without it miss (`policy/mends`), and without CUDA it leads what takes a GPU for granted to the CPU
(`policy/without_cuda.py`).
"""

import contextlib
import gc
import importlib.machinery
import importlib.util
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Literal
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from gtpo_megatron import control, network, rollcall
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


def device_name() -> str:
    """What the driver calls this rank's GPU; "cpu" without one."""
    return torch.cuda.get_device_name() if HAS_CUDA else "cpu"


def synchronize() -> None:
    """Wait for the device, so that host clocks tell the truth."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: the allocator's on CUDA, resident set on CPU."""
    if HAS_CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def give_back_cached_memory() -> None:
    """Let the device have what this process has freed, handles that others have let go of included."""
    if HAS_CUDA:
        gc.collect()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def host_memory_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised host memory for a copy of the tensor; page-locked where there is a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_CPU, pin_memory=HAS_CUDA)


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
    if has_transformer_engine():
        return
    from gtpo_megatron.policy import without_cuda
    from gtpo_megatron.policy.mends import core

    core.stand_in_for_paged_stash()  # before anything imports what needs it
    if not HAS_CUDA:
        without_cuda.install()
    core.mend()


@contextlib.contextmanager
def importing_bridge() -> Iterator[None]:
    """Let `import megatron.bridge` succeed without Transformer Engine, which some of its modules import at their top.

    The stand-ins are in sys.modules only inside the context, and only after megatron.core has looked for the real
    package, so no code takes them for an installed Transformer Engine. Without CUDA the compiler is idle meanwhile, as it is for
    Megatron-Core: Bridge 0.6 marks a model's functions for it as well.
    """
    if has_transformer_engine():
        yield
        return
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.transformer.moe.moe_layer  # noqa: F401

    from gtpo_megatron.policy import without_cuda

    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    if importlib.util.find_spec("triton") is None:
        names += ["triton", "triton.language"]
    stand_ins = {name: _stand_in(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        with contextlib.nullcontext() if HAS_CUDA else without_cuda.idle_compiler():
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
    with gloo_interface():
        if _launched():
            with _port_is_free():
                dist.init_process_group(backend(), timeout=control.STEP_LIMIT)
        else:
            dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
        control.group()
    rollcall.answer_calls()


@contextlib.contextmanager
def _port_is_free() -> Iterator[None]:
    """That another program has the port at which the ranks meet is for a person to mend: it would be so again."""
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise UserError(
            f"MASTER_PORT={port}: another program on this machine listens at this port, where the ranks are to meet; set "
            "MASTER_PORT to a free one (under Slurm in the site's env, or submit again: it follows from the job's number)"
        ) from error


def gloo_interface() -> contextlib.AbstractContextManager[None]:
    """For the making of process groups: gloo is to take the network interface by which this rank reaches the others.

    Where the machines of a world call their master by a loopback address, it is left to find one by itself.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1") if _launched() else "127.0.0.1"
    alone = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE") or not _launched()
    if not alone and network.is_loopback(network.own_address(master)):
        return contextlib.nullcontext()
    return network.gloo_towards(master)


def _launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
