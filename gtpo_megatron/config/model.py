"""`model`: the policy."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


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
