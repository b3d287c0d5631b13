"""Mends of what Megatron-Core builds of Transformer Engine's layers."""

from collections.abc import Sequence
from typing import Any

import megatron.core.extensions.transformer_engine as layers
from torch import Tensor, nn

from gtpo_megatron.policy.mends.table import MENDS

_split_extra_state = layers.TEGroupedLinear._split_extra_state if layers.HAVE_TE else None


def mend() -> None:
    """Mend what is needed of this version. Again is as once."""
    if layers.HAVE_TE and MENDS["expert-state"].applies():
        layers.TEGroupedLinear._split_extra_state = _split_what_there_is


def _split_what_there_is(self: Any, state: Any) -> list[Any]:
    """FP8 without state of its own has an empty one, for each expert as for all."""
    if isinstance(state, Tensor) and state.numel() == 0:
        return [state] * self.num_gemms
    return _split_extra_state(self, state)


def mark_expert_shards(model: nn.Module) -> None:
    """Let every shard of experts that are split over tensor ranks count in the gradient's norm.

    Transformer Engine is told that such experts are whole, because Megatron-Core's dispatcher does the communication: their
    weights stay without the mark by which the norm tells a shard from a copy.
    """
    if not layers.HAVE_TE or not MENDS["expert-shards"].applies():
        return
    for module in model.modules():
        grouped = isinstance(module, layers.TEGroupedLinear)
        if grouped and module.explicit_expert_comm and module._tp_group.size() > 1:
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("weight"):
                    parameter.tensor_model_parallel = True


def forget_made_values(models: Sequence[nn.Module]) -> None:
    """Weights kept in FP8 by delayed scaling: let the first scale know nothing of the memory that they were made of."""
    if not MENDS["fp8-first-scale"].applies():
        return
    for weight in (weight for model in models for weight in model.parameters()):
        amax = getattr(getattr(weight, "_quantizer", None), "amax", None)
        if amax is not None:
            amax.zero_()


def start_from_loaded(bridge: Any, models: Sequence[nn.Module], distributed_optimizer: bool) -> None:
    """Weights kept in FP8: let the distributed optimizer's main weights be the checkpoint's, read a second time, unrounded.

    Each weight remembers what it was made with, for the main weights to start from. The bridge makes it with memory as it lies,
    and copies the checkpoint into what was rounded of that. Other optimizers take the FP8 values.
    """
    if not MENDS["fp8-main-weights"].applies():
        return
    weights = [weight for model in models for weight in model.parameters() if _remembered(weight) is not None]
    if not distributed_optimizer:
        for weight in weights:
            weight.clear_high_precision_init_val()  # whole weights in host memory
        return
    model_bridge, checkpoint = bridge._model_bridge, bridge.hf_pretrained
    for task in model_bridge.build_conversion_tasks(checkpoint, models):
        if task.megatron_module is None or _remembered(task.param_weight) is None:
            continue
        source = model_bridge.maybe_modify_loaded_hf_weight(task.mapping.hf_param, checkpoint.state)
        loaded = task.mapping.hf_to_megatron(source, task.megatron_module)
        _remembered(task.param_weight).copy_(loaded)


def _remembered(weight: Tensor) -> Tensor | None:
    return weight.get_high_precision_init_val() if hasattr(weight, "get_high_precision_init_val") else None
