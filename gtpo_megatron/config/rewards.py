"""`rewards`: what a completion is worth."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gtpo_megatron.config.section import Section


class RewardTerm(Section):
    """One weighted term of the reward."""

    kind: Literal["paper_format", "paper_correctness", "math_verify", "format", "python"] = Field(
        description="one of the built-in terms, or python for a function of yours"
    )
    name: str | None = Field(None, description="name in the metrics; default: the kind")
    weight: float = Field(1.0, ge=-1e6, le=1e6, description="factor of the term in the reward")
    function: str | None = Field(None, description="package.module:function, for kind python")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")

    @field_validator("options")
    @classmethod
    def _finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        if not _all_finite(options):
            raise ValueError("an option is NaN or infinite")
        return options

    @model_validator(mode="after")
    def _function(self) -> Self:
        if (self.kind == "python") != (self.function is not None):
            raise ValueError("rewards.terms[].function goes with kind: python, and only with it")
        return self


class RewardConfig(Section):
    """What a completion is worth, and how its scoring is bounded."""

    terms: tuple[RewardTerm, ...] = Field(
        (RewardTerm(kind="paper_format"), RewardTerm(kind="paper_correctness")),
        description="summed with their weights; default: the paper's reward",
    )
    workers: int = Field(2, ge=1, le=1024, description="worker processes")
    timeout_s: float = Field(10.0, gt=0, le=86_400, description="limit for scoring one completion")
    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="above this share of failed scorings in a step the run stops"
    )


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
