"""Mends of what Megatron-Core builds of Transformer Engine's layers."""

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
