"""`logging`: where metrics go."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write tensorboard/ in the run's directory")
    wandb: bool = Field(False, description="log to Weights & Biases; needs its package")
    wandb_project: str = Field("gtpo-megatron", description="project there")
    progress: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="a live display, a line a step, or nothing; auto: live in a terminal"
    )
