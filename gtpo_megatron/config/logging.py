"""`logging`: where metrics go."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write tensorboard/ in the run's directory")
    wandb: bool = Field(False, description="log to Weights & Biases; needs its package")
    wandb_project: str = Field("gtpo-megatron", description="project there")
    seen: Literal["off", "completions", "logprobs", "entropies"] = Field(
        "logprobs",
        description="what training saw, written beside each batch: nothing; of completions; also the tokens' "
        "log-probabilities; also their entropies (bf16)",
    )
    progress: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="a live display, a line a step, or nothing; auto: live in a terminal"
    )
