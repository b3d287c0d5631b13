"""`evaluation`: held-out prompts."""

from pydantic import Field

from gtpo_megatron.config.data import DataConfig
from gtpo_megatron.config.section import Section


class EvaluationConfig(Section):
    """Greedy or sampled accuracy on held-out prompts."""

    data: DataConfig | None = Field(None, description="held-out prompts; none: no evaluation")
    every: int = Field(
        0, ge=0, le=1_000_000_000, description="steps between evaluations; 0: only before and after training"
    )
    samples: int = Field(1, ge=1, le=10_000, description="completions per prompt; 1 is greedy")
    max_new_tokens: int | None = Field(
        None, ge=1, le=10_000_000, description="default: rollout.max_new_tokens"
    )
