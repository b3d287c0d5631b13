"""`rollout`: how completions are sampled."""

from typing import Literal, Self

from pydantic import Field

from gtpo_megatron.config.section import Section
from gtpo_megatron.config.sglang import SGLangConfig


class DynamicSampling(Section):
    """Replace groups without signal (all rewards equal)."""

    enabled: bool = Field(False, description="sample new prompts in their place")
    max_rounds: int = Field(
        3, ge=1, le=1000, description="rounds of replacement before the step goes on with what it has"
    )


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="transformers' generation in the trainer, or SGLang servers"
    )
    placement: Literal["apart", "together"] = Field(
        "apart",
        description="servers on GPUs of their own, or on those of the ranks of this machine, which then take turns with them",
    )
    prompts_per_step: int = Field(8, ge=1, le=1_000_000, description="groups in a step's batch")
    group_size: int = Field(8, ge=2, le=10_000, description="completions of each prompt (G)")
    max_new_tokens: int = Field(512, ge=1, le=10_000_000, description="tokens of a completion at most")
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="divides the logits, in sampling and in the loss"
    )
    top_p: float = Field(1.0, ge=1e-6, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, le=1_000_000, description="sample from the k most likely tokens; 0: off")
    batch_size: int = Field(
        128, ge=1, le=1_000_000, description="embedded engine: completions generated at once"
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="how many steps old the sampling weights may be; servers get new ones once a step",
    )
    oversample: float = Field(
        1.0,
        ge=1,
        le=100,
        description="sample this many times the prompts, keep the first finished, put the others back",
    )
    dynamic_sampling: DynamicSampling = Field(
        DynamicSampling(), description="replacement of groups without signal"
    )
    sglang: SGLangConfig = SGLangConfig()

    @property
    def servers(self) -> SGLangConfig:
        """`sglang` as `placement` completes it: together, the first server stands on the first rank's GPU."""
        if self.placement == "apart" or self.sglang.first_gpu is not None:
            return self.sglang
        return self.sglang.model_copy(update={"first_gpu": 0})

    @property
    def alone(self) -> Self:
        """Of the same servers where no trainer is beside them: its GPUs are theirs, and weights come from host memory."""
        if self.placement == "apart":
            return self
        sglang = self.servers.model_copy(update={"weight_transfer": "distributed"})
        return self.model_copy(update={"placement": "apart", "sglang": sglang})
