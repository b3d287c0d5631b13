"""`checkpoint`: saving and resuming."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(0, ge=0, le=1_000_000_000, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, le=1_000_000, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, le=1_000_000_000, description="checkpoints at multiples of this step are never deleted"
    )
    asynchronous: bool = Field(False, description="write the weights while training goes on")
    on_corrupt: Literal["error", "previous"] = Field(
        "previous", description="a damaged newest checkpoint: stop, or warn and use the one before"
    )
    export_hf: bool = Field(
        True, description="write a Hugging Face directory at the end, and of LoRA the adapters too"
    )
