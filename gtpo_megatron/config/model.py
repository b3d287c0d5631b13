"""`model`: the policy."""

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

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


class Fp8Config(Section):
    """FP8 matrix products by Transformer Engine; `model.fp8: hybrid` is short for `model.fp8.format: hybrid`.

    The default recipe scales each tensor by its own largest value. It keeps no state: a pass that scores and one that trains
    give a token the same logprob, and a resumed run goes on exactly. It runs wherever FP8 runs, which block scaling does
    not. Block scaling with e4m3, as DeepSeek-V3 trained, is for Hopper with a new CUDA, and where the servers' weights are
    scaled in blocks. Delayed scaling takes scales from earlier passes, and is here for comparison.
    """

    format: Literal["none", "hybrid", "e4m3"] = Field(
        "none", description="hybrid: E4M3 forward, gradients in E5M2; e4m3: both in E4M3"
    )
    recipe: Literal["tensorwise", "blockwise", "delayed"] = Field(
        "tensorwise",
        description="where scales come from: the tensor, its blocks of 128, or earlier passes (delayed)",
    )
    first_last_bf16: bool = Field(
        False, description="the first and the last layer stay in bf16; not with recipe: delayed"
    )
    param: bool = Field(
        False, description="weights of the layers are kept in FP8 too; the optimizer's copy stays in fp32"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_format(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @property
    def enabled(self) -> bool:
        """Whether any layer computes in FP8."""
        return self.format != "none"


class ModelConfig(Section):
    """The policy: a Hugging Face checkpoint."""

    path: str = Field(description="Hugging Face checkpoint directory or hub name")
    tokenizer: str | None = Field(
        None, description="tokenizer directory or hub name; the model's own by default"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="parameter and activation type")
    fp8: Fp8Config = Fp8Config()
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="layer implementation: Transformer Engine where it is installed, else Megatron-Core's local layers",
    )
    lora: LoraConfig | None = Field(
        None, description="train LoRA adapters alone, the model's weights frozen; null: train all weights"
    )
