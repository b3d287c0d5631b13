"""LoRA adapters on a policy's layers: Megatron-Bridge's own (CanonicalLoRA), under the names of Hugging Face's PEFT.

CanonicalLoRA keeps an adapter for each of q, k, v, gate and up, as PEFT does, where plain LoRA would have one for the fused
matrices. Which settings are possible is the plan's to say (plan.lora).
"""

import contextlib
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor, nn

from gtpo_megatron.config import LoraConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform

with platform.importing_bridge():
    from megatron.bridge.models.conversion.param_mapping import ColumnParallelMapping, RowParallelMapping
    from megatron.bridge.peft import recompute, utils
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA

if not platform.has_transformer_engine():
    utils.HAVE_TE = False  # it takes Megatron-Core's empty stand-ins for classes of Transformer Engine

# PEFT's target -> CanonicalLoRA's
TARGETS = {
    "q_proj": "linear_q",
    "k_proj": "linear_k",
    "v_proj": "linear_v",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1_gate",
    "up_proj": "linear_fc1_up",
    "down_proj": "linear_fc2",
}
PREFIX = "base_model.model."  # of every tensor's name in an adapter_model.safetensors
WEIGHTS = "adapter_model.safetensors"


def attach(bridge: Any, modules: list[nn.Module], lora: LoraConfig, seed: int) -> CanonicalLoRA:
    """Freeze the modules and give their target layers adapters: those of `lora.path`, or new ones. Collective.

    New ones are PEFT's: A uniform in +-1 / sqrt(inputs), B zero. They depend on seed and layer, not on the layout.
    Raises UserError on every rank where the file does not hold exactly these adapters.
    """
    peft = CanonicalLoRA(
        target_modules=[TARGETS[target] for target in lora.targets],
        dim=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
    )
    recompute.PEFT_RECOMPUTE_PATCHED.clear()  # it knows models by id(), which a later model may have again
    with contextlib.redirect_stdout(io.StringIO()):  # it prints on rank 0
        peft(modules, training=True)
    for module in modules:
        _gather_in_the_adapters(module)
        module.to(platform.device())
        for name, adapter in module.named_modules():
            # Else its checkpoints split each of gate and up in two, as a fused matrix: wrong in another tensor layout.
            if isinstance(adapter, utils.ParallelLinearAdapter) and "linear_fc1" in name:
                adapter.base_linear_name = name.rpartition("adapter_")[2]
    stored = _stored(Path(lora.path)) if lora.path else None
    tasks = _tasks(bridge, modules)
    if stored is not None:
        _check_names(Path(lora.path), {PREFIX + task.mapping.hf_param for task in tasks}, set(stored))
    for task in tasks:
        if task.param_weight is not None:  # on this pipeline stage
            shape = _whole_shape(task)
            whole = stored[PREFIX + task.mapping.hf_param] if stored else _initial(task, shape, seed)
            if whole.shape != shape:
                raise UserError(
                    f"model.lora.path: {lora.path}: {task.mapping.hf_param} has the shape {list(whole.shape)}, not "
                    f"{list(shape)}: the adapter is of another base or rank"
                )
            _assign(task, whole)
    return peft


def _gather_in_the_adapters(module: nn.Module) -> None:
    """Let adapters gather the normed input over sequence-parallel ranks themselves.

    Transformer Engine would hand it out gathered, and drop the gradient that comes back for it: all layers below would
    train on wrong gradients, silently.
    """
    for wrapper in module.modules():
        base = getattr(wrapper, "to_wrap", None)
        if getattr(base, "return_layernorm_output_gathered", False):
            base.return_layernorm_output_gathered = False
            for adapter in wrapper.adapter.modules():
                if isinstance(adapter, utils.ParallelLinearAdapter):
                    adapter.disable_sequence_parallel_comm = False


def adapter_weights(bridge: Any, modules: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Stream (PEFT name, whole tensor on the CPU). Collective: every rank must drain it; all get all tensors."""
    for name, tensor in bridge.export_adapter_weights(modules, cpu=True, show_progress=False):
        yield PREFIX + name, tensor.detach()


def is_adapter(name: str) -> bool:
    """Whether a parameter or sharded tensor of this name belongs to an adapter."""
    return ".adapter." in name


def _tasks(bridge: Any, modules: list[nn.Module]) -> list[Any]:
    """The bridge's own description of every adapter matrix of the whole model, in the same order on every rank."""
    by_base = bridge._model_bridge.build_adapter_conversion_tasks(modules)  # noqa: SLF001  (no public name)
    return [
        task
        for part in by_base.values()
        for both in part
        for task in (both.linear_in_task, both.linear_out_task)
    ]


def _whole_shape(task: Any) -> tuple[int, int]:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rows, columns = task.param_weight.shape
    if isinstance(task.mapping, ColumnParallelMapping):
        return torch.Size((rows * ranks, columns))
    return torch.Size((rows, columns * ranks if isinstance(task.mapping, RowParallelMapping) else columns))


def _initial(task: Any, shape: tuple[int, int], seed: int) -> Tensor:
    name = task.mapping.hf_param
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


@torch.no_grad()
def _assign(task: Any, whole: Tensor) -> None:
    weight = task.param_weight
    weight.copy_(task.mapping.hf_to_megatron(whole.to(weight.device, weight.dtype), task.megatron_module))


def _stored(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except Exception as error:  # safetensors' own, and OSError
        raise UserError(f"model.lora.path: {directory / WEIGHTS}: {error}") from error


def _check_names(directory: Path, wanted: Sequence[str] | set[str], stored: set[str]) -> None:
    missing, extra = sorted(set(wanted) - stored), sorted(stored - set(wanted))
    if missing or extra:
        raise UserError(
            f"model.lora.path: {directory}: not the adapters of this model: {len(missing)} are missing "
            f"({', '.join(missing[:3])}) and {len(extra)} unknown ({', '.join(extra[:3])})"
        )
