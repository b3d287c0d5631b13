"""Rules on the optimizer in host memory: what Megatron-Core's offload does not go with."""

from collections.abc import Iterator

from gtpo_megatron.config import RunConfig


def offload_problems(config: RunConfig) -> Iterator[str]:
    """Settings beside which `optimizer.offload` would fail, or would have next to no effect."""
    if not config.optimizer.offload:
        return
    if not config.optimizer.distributed:
        yield (
            "optimizer.offload: true needs optimizer.distributed: true: Megatron-Core's other optimizers keep fp32 weights on the "
            "GPU, and would not update the host's"
        )
    if config.model.dtype != "bf16":
        yield f"optimizer.offload: true needs model.dtype: bf16, not {config.model.dtype}: its checkpoints cannot be loaded otherwise"
    if config.model.fp8.param:
        yield "optimizer.offload: true does not go with model.fp8.param: true; drop one of the two"
    if config.model.lora is not None:
        yield "optimizer.offload: true with model.lora: the adapters' Adam is small, and stays on the GPU; drop optimizer.offload"
