"""`algorithm`: the objective."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gtpo_megatron.config.section import Section


class GateConfig(Section):
    """The entropy filter of completions."""

    mode: Literal["paper", "always", "only_negative", "off"] = Field(
        "paper", description="which completions the filter may drop: docs/algorithm.md"
    )
    threshold: float = Field(0.6931471805599453, gt=0, le=100, description="nats; ln 2 is provable")


class ImportanceConfig(Section):
    """Truncated importance sampling between sampler and trainer."""

    level: Literal["off", "token", "sequence"] = Field(
        "off", description="weigh every token, or every completion as a whole"
    )
    cap: float = Field(2.0, gt=0, le=1e6, description="the largest weight")


class AlgorithmConfig(Section):
    """The objective."""

    name: Literal["gtpo", "grpo", "sft"] = Field("gtpo", description="the objective: GTPO, or a baseline")
    compat: Literal["paper", "reference"] = Field(
        "paper", description="reference: reproduce the authors' implementation"
    )
    gamma: float = Field(0.1, ge=0, le=1e4, description="weight of the entropy term in the GTPO advantage")
    positive_weight: float = Field(
        2.0, ge=0, le=1e4, description="weight of conflict tokens in positive completions"
    )
    negative_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of conflict tokens in negative completions; GTPO's is 0, 1 protects nothing (an ablation)",
    )
    normalize: Literal["mean", "std"] | None = Field(
        None,
        description="advantages: less the group's mean, or also over its deviation; default: mean for GTPO, std for GRPO",
    )
    gate: GateConfig = GateConfig()
    clip_low: float = Field(0.2, ge=0, le=1, description="GRPO: lower clipping range")
    clip_high: float = Field(0.2, ge=0, le=1e4, description="GRPO: upper clipping range")
    kl_beta: float = Field(
        0.0, ge=0, le=1e4, description="GRPO: weight of the k3 KL term; 0 loads no reference policy"
    )
    updates_per_batch: int = Field(
        1, ge=1, le=10_000, description="optimizer updates on each batch; above 1 pi_old is needed"
    )
    old_logprobs: Literal["trainer", "sampler"] = Field(
        "trainer", description="source of pi_old when it is needed"
    )
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def advantages(self) -> Literal["mean", "std"]:
        """How advantages are made of rewards: `normalize`, or what the objective's authors do."""
        return self.normalize or ("std" if self.name == "grpo" else "mean")

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.compat == "reference" and self.name != "gtpo":
            raise ValueError("algorithm.compat: reference goes with algorithm.name: gtpo")
        if self.kl_beta and self.name != "grpo":
            raise ValueError(
                "algorithm.kl_beta is a term of GRPO; GTPO and SFT have no reference policy (algorithm.name: grpo)"
            )
        return self
