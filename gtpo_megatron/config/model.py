"""`model`: the policy."""

from typing import Literal, get_args

from pydantic import Field

from gtpo_megatron.config.section import Section

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """Adapters of low rank (LoRA), trained in place of the model's own weights. Only where this section is given."""

    rank: int = Field(32, ge=1, description="inner width of every adapter; a multiple of parallel.tensor")
    alpha: int = Field(32, ge=1, description="an adapter's output is scaled by alpha / rank")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget),
        description="layers with adapters, in PEFT's names; q, k and v only together, and so gate and up",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of an adapter's inputs zeroed in training; needs parallel.tensor 1",
    )
    path: str | None = Field(
        None,
        description="directory of an adapter in Hugging Face's PEFT format to start from; null: a new one",
    )


class ModelConfig(Section):
    """The policy: a Hugging Face checkpoint."""

    path: str = Field(description="Hugging Face checkpoint directory or hub name")
    tokenizer: str | None = Field(
        None, description="tokenizer directory or hub name; the model's own by default"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="parameter and activation type")
    fp8: Literal["none", "hybrid", "e4m3"] = Field(
        "none", description="Transformer Engine FP8 recipe; needs CUDA and bf16"
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="layer implementation: Transformer Engine where it is installed, else Megatron-Core's local layers",
    )
    lora: LoraConfig | None = Field(
        None, description="train LoRA adapters alone, the model's weights frozen; null: train all weights"
    )
