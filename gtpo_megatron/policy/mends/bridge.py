"""Mends of Megatron-Bridge, whose faults would load or export wrong weights."""

import copy
import re
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from torch import Tensor, nn

from gtpo_megatron.policy import platform
from gtpo_megatron.policy.mends.table import MENDS

with platform.importing_bridge():
    from megatron.bridge.models.conversion import model_bridge, param_mapping

_VOCABULARY_PARAMETERS = ("word_embeddings.weight", "output_layer.weight")
_LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.(linear_fc\d)\.weight")
# upstream's own
UPSTREAM: dict[str, Callable[..., Any]] = {
    "contiguous-scatter": param_mapping.MegatronParamMapping.scatter_to_tp_ranks,
    "expert-gather": param_mapping.MegatronParamMapping.gather_from_ep_ranks,
    "expert-names": model_bridge._megatron_local_name_to_global,
    "shared-embeddings": model_bridge.MegatronModelBridge._broadcast_shared_embeddings,
    "vocabulary-padding": param_mapping.ColumnParallelMapping.hf_to_megatron,
}


def mend() -> None:
    """Mend what is needed of this version. Again is as once."""
    mapping, columns = param_mapping.MegatronParamMapping, param_mapping.ColumnParallelMapping
    if MENDS["contiguous-scatter"].applies():
        mapping.scatter_to_tp_ranks = _scatter_contiguous
    if MENDS["expert-gather"].applies():
        mapping.gather_from_ep_ranks = _gather_experts
    if MENDS["expert-names"].applies():
        model_bridge._megatron_local_name_to_global = _name_experts
    if MENDS["vocabulary-padding"].applies():
        columns.hf_to_megatron = _split_padded
    if MENDS["shared-embeddings"].applies():
        model_bridge.MegatronModelBridge._broadcast_shared_embeddings = _broadcast_of_last_chunk


def _scatter_contiguous(self: Any, splits: list[Tensor] | None, *args: Any, **kwargs: Any) -> Tensor:
    splits = [s.contiguous() for s in splits] if splits else splits
    return UPSTREAM["contiguous-scatter"](self, splits, *args, **kwargs)


def _gather_experts(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    # the local layers name the expert in the middle: experts.local_experts.3.linear_fc1.weight
    alias = copy.copy(self)
    alias.megatron_param = _LOCAL_EXPERT.sub(r"\2.weight\1", self.megatron_param)
    return UPSTREAM["expert-gather"](alias, *args, **kwargs)


def _name_experts(models: Any, config: Any, name: str, *args: Any, **kwargs: Any) -> str:
    result = UPSTREAM["expert-names"](models, config, name, *args, **kwargs)
    local, named = (re.search(r"local_experts\.(\d+)\.", text) for text in (name, result))
    rank = parallel_state.get_expert_model_parallel_rank()
    if local is None or rank == 0 or local[1] != named[1]:
        return result
    per_rank = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    return result.replace(local[0], f"local_experts.{rank * per_rank + int(local[1])}.")


def _broadcast_of_last_chunk(self: Any, models: list[nn.Module]) -> None:
    # upstream looks at the first of what it is given; the last stage's output layer is in its last chunk
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    UPSTREAM["shared-embeddings"](self, models[-1:] if last else models[:1])


def _split_padded(self: Any, hf_weights: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if hf_weights is not None and self.megatron_param.endswith(_VOCABULARY_PARAMETERS):
        missing = -hf_weights.size(0) % self.tp_size
        hf_weights = nn.functional.pad(hf_weights, (0, 0, 0, missing)) if missing else hf_weights
    return UPSTREAM["vocabulary-padding"](self, hf_weights, *args, **kwargs)
