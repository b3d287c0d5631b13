"""Megatron's Adam over the policy's gradient buffers, with warm-up and decay of the learning rate."""

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gtpo_megatron.config import OptimizerConfig
from gtpo_megatron.policy.model import DTYPES, Policy
from gtpo_megatron.policy.step import gradients_are_finite

# Megatron's offload of the optimizer, all of it: gradients go to the host as they lie in their buffer, without an fp32 copy on
# the GPU (which Megatron calls a precision-aware optimizer), and each parameter's update begins as soon as its gradient is there.
_ON_HOST: dict[str, Any] = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "use_precision_aware_optimizer": True,
    "use_precision_aware_optimizer_no_fp8_or_ds_fp8": True,  # follows from the others
    "store_param_remainders": False,  # of Transformer Engine's Adam, which has no part in it
}


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule; both have state to save."""

    megatron: Any
    schedule: OptimizerParamScheduler

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last update."""
        return self.megatron.param_groups[0]["lr"]


@dataclass(frozen=True)
class Update:
    """What an update did."""

    applied: bool  # False: loss or gradients were not finite; parameters and optimizer state are as before
    grad_norm: float  # before clipping
    learning_rate: float


def build_optimizer(config: OptimizerConfig, policy: Policy, steps: int) -> Optimizer:
    """The optimizer of a policy built with gradient buffers, scheduled over `steps` updates."""
    dtype = DTYPES["bf16" if policy.bf16 else "fp32"]
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad or math.inf,  # without a limit Megatron would not measure the norm
        bf16=policy.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
        fp8_recipe=policy.config.fp8_recipe if policy.config.fp8 else None,
    )
    if config.offload:
        # not by the constructor, which fails on them without Transformer Engine (megatron-core 0.16)
        for name, value in _ON_HOST.items():
            setattr(settings, name, value)
    megatron = get_megatron_optimizer(settings, policy.chunks)
    policy.config.grad_scale_func = megatron.scale_loss
    schedule = OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(steps, 1),
        wd_incr_style="constant",
    )
    return Optimizer(megatron, schedule)


def apply_update(optimizer: Optimizer, policy: Policy, loss: float) -> Update:
    """Clip, update, and move the schedule on. A loss or gradient that is not finite is skipped, and said."""
    if not (math.isfinite(loss) and gradients_are_finite(policy)):
        return Update(False, math.nan, optimizer.learning_rate)
    optimizer.schedule.step(increment=1)
    _, grad_norm, _ = optimizer.megatron.step()
    # in fp32 it leaves parameter.grad an alias of the gradient buffer, and the next backward would count itself twice
    optimizer.megatron.zero_grad()
    return Update(True, float(grad_norm), optimizer.learning_rate)
