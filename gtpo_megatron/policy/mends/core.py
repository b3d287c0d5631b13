"""Mends of Megatron-Core's paths without Transformer Engine, on a CPU and on GPUs alike."""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from gtpo_megatron.policy.mends.table import MENDS

UPSTREAM: dict[str, Callable[..., Any]] = {}  # what the mends have replaced
PAGED_STASH = "megatron.core.transformer.moe.ops.paged_stash"


def mend() -> None:
    """Mend what is needed of this version. Again is as once."""
    stand_in_for_paged_stash()
    _define_router_gemm()
    _keep_adam_steps()


def stand_in_for_paged_stash() -> None:
    """Let mixtures of experts be imported where Triton is not installed."""
    absent = importlib.util.find_spec("triton") is None
    if not (absent and MENDS["paged-stash"].applies()) or PAGED_STASH in sys.modules:
        return
    module = types.ModuleType(PAGED_STASH)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the paged stash of megatron-core's MoE layers needs triton")

    def getattribute(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return missing

    module.__getattr__ = getattribute  # type: ignore[method-assign]
    sys.modules[PAGED_STASH] = module


def _define_router_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if MENDS["router-gemm"].applies() and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _keep_adam_steps() -> None:
    """torch's AdamW keeps a step per parameter, which upstream restores elsewhere and then misses here."""
    import megatron.core.optimizer.distrib_optimizer as module

    if module.HAVE_APEX_OR_TE or "adam-step" in UPSTREAM or not MENDS["adam-step"].applies():
        return
    original = module.DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                # upstream shares one step tensor between all parameters
                state["step"] = state["step"].clone()
                tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    UPSTREAM["adam-step"] = original
    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_states
