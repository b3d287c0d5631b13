"""Mends of what Megatron-Core builds of Transformer Engine's layers."""

from torch import nn

from gtpo_megatron.policy.mends.table import MENDS


def mark_expert_shards(model: nn.Module) -> None:
    """Let every shard of experts that are split over tensor ranks count in the gradient's norm.

    Transformer Engine is told that such experts are whole, because Megatron-Core's dispatcher does the communication: their
    weights stay without the mark by which the norm tells a shard from a copy.
    """
    if not MENDS["expert-shards"].applies():
        return
    for module in model.modules():
        grouped = hasattr(module, "num_gemms")  # Transformer Engine's alone
        if grouped and module.explicit_expert_comm and module._tp_group.size() > 1:
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("weight"):
                    parameter.tensor_model_parallel = True
