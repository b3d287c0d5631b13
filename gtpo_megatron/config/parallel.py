"""`parallel`: how the policy is spread over ranks."""

from typing import Self

from pydantic import Field, model_validator

from gtpo_megatron.config.section import Section


class ParallelConfig(Section):
    """How the policy is spread over ranks. Data parallelism is what remains of the world size."""

    tensor: int = Field(1, ge=1, le=10_000, description="ranks that share every matrix")
    pipeline: int = Field(1, ge=1, le=10_000, description="stages that share the layers")
    virtual_pipeline: int | None = Field(
        None, ge=2, le=10_000, description="model chunks per pipeline rank (interleaved schedule)"
    )
    context: int = Field(1, ge=1, le=10_000, description="ranks that share every sequence")
    expert: int = Field(1, ge=1, le=10_000, description="ranks that share the experts of a mixture")
    sequence: bool = Field(False, description="sequence parallelism; needs tensor > 1")

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence: true needs parallel.tensor > 1")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline needs parallel.pipeline > 1")
        return self
