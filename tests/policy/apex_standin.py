"""A PyTorch function under the name of apex's one kernel that this project uses, for ranks on CPUs."""

import importlib.machinery
import sys
import types

from torch import Tensor

NAME = "fused_weight_gradient_mlp_cuda"
CALLS: list[tuple[int, ...]] = []
"""Shapes of the weights whose gradients were added."""


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T inputs"""
    CALLS.append(tuple(main_grad.shape))
    main_grad.addmm_(grad_output.float().t(), inputs.float())


def install() -> None:
    """Put the module in place, and let the project find it though there is no GPU. Before megatron is imported."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core is imported already, without apex")
    module = types.ModuleType(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32
    sys.modules[NAME] = module
    from gtpo_megatron.policy import platform  # imports megatron

    platform.use_fused_weight_gradient = lambda: True  # the real one asks for a GPU, too


def calls_of_a_step(*layout: object) -> tuple[dict[str, object], set[tuple[int, ...]]]:
    """What `run_layout` gives on this rank, and the shapes that the stand-in was called for."""
    from tests.parallel.layout_job import run_layout

    CALLS.clear()
    return run_layout(*layout), set(CALLS)
