"""`optimizer`: Adam."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class OptimizerConfig(Section):
    """Megatron's Adam with warm-up and decay."""

    lr: float = Field(1e-6, gt=0, le=10, description="learning rate after warm-up")
    min_lr: float = Field(0.0, ge=0, le=10, description="learning rate at the end of the decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="decay of the learning rate over all updates"
    )
    warmup_steps: int = Field(
        0, ge=0, le=1_000_000_000, description="updates in which the learning rate rises from 0"
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="decoupled (AdamW)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(1e-8, gt=0, le=1, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, le=1e6, description="largest norm of the gradient; 0: off")
    distributed: bool = Field(False, description="shard the optimizer state over data-parallel ranks")
    offload: bool = Field(
        False,
        description="keep Adam's state and fp32 weights in host memory, and let the host compute its update",
    )
