"""`training`: the loop."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


class ProfileConfig(Section):
    """Traces of training by torch.profiler."""

    steps: tuple[int, ...] = Field(
        (),
        description="steps of which training is traced, counted as in the metrics; none: nothing is traced",
    )
    ranks: tuple[int, ...] = Field((0,), description="ranks that are traced")


class TrainingConfig(Section):
    """The loop."""

    steps: int = Field(ge=1, le=1_000_000_000, description="steps of the run: batches sampled and trained on")
    micro_batch_tokens: int = Field(
        4096, ge=1, le=1_000_000_000, description="token budget of a packed micro-batch, prompts included"
    )
    sft_batch_size: int = Field(16, ge=1, le=1_000_000, description="SFT: examples per step")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in the backward pass, to save memory"
    )
    seed: int = Field(
        0, ge=0, le=4_294_967_295, description="of the prompts' order, and of sampling where the engine can"
    )
    deterministic: bool = Field(True, description="deterministic kernels where there is a choice")
    max_bad_steps: int = Field(
        3,
        ge=1,
        le=1_000_000,
        description="stop after this many steps in a row with NaN or infinite gradients",
    )
    stuck_after_s: float = Field(
        600.0,
        ge=0,
        le=604_800,
        description="seconds without a micro-batch or an update after which ranks that train count as stuck, and end; 0: never",
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over data-parallel ranks during the backward pass"
    )
    profile: ProfileConfig = ProfileConfig()
