"""`alarm`: early warning of a collapse."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class AlarmConfig(Section):
    """Early warning of a collapse, from the metrics: docs/alarm.md. 0 turns a rule off."""

    action: Literal["off", "warn", "stop"] = Field(
        "warn", description="stop: save and end when a rule has fired for `patience` steps in a row"
    )
    patience: int = Field(5, ge=1, le=1_000_000, description="steps in a row, for stop")
    baseline: int = Field(
        5, ge=1, le=10_000, description="steps at the start that later ones are held against"
    )
    window: int = Field(3, ge=1, le=10_000, description="newest steps that are averaged")
    entropy_rise: float = Field(1.25, ge=0, le=1e6, description="entropy, times that of the start")
    entropy_fall: float = Field(0.1, ge=0, le=1, description="entropy below this share of the start's")
    length_change: float = Field(
        1.5, ge=0, le=1e6, description="mean length: so many times longer or shorter than at the start"
    )
    truncated_rise: float = Field(
        0.1, ge=0, le=1, description="truncated completions above the start's share by this"
    )
    repetition_rise: float = Field(
        0.2, ge=0, le=1, description="repeated runs of 4 tokens above the start's share by this"
    )
    format_fall: float = Field(
        0.8, ge=0, le=1, description="a reward term with `format` in its name below this share of its best"
    )
    grad_norm_rise: float = Field(10.0, ge=0, le=1e9, description="gradient norm, times that of the start")
    no_signal: float = Field(
        0.9,
        ge=0,
        le=1,
        description="groups whose rewards are all equal, while the reward is no higher than at the start",
    )
    logprob_gap_rise: float = Field(
        10.0,
        ge=0,
        le=1e9,
        description="|trainer - sampler| log-probability, times the start's, above 0.02 nats",
    )
