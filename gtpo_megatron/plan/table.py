"""The layout as tables, for --dry-run."""

from rich.console import Console
from rich.table import Table

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.layout import (
    HFShape,
    data_parallel_size,
    model_parameters,
    rank_layout,
    rank_parameters,
    rank_state_bytes,
    stage_layers,
)
from gtpo_megatron.plan.lora import adapter_parameters

RANKS_SHOWN = 32


def print_layout(config: RunConfig, shape: HFShape, world_size: int, console: Console) -> None:
    """Print the stages (layers, parameters and memory per rank) and each rank's coordinates."""
    parallel, lora = config.parallel, config.model.lora
    data = data_parallel_size(parallel, world_size)
    console.print(
        f"{shape.architecture}: {model_parameters(shape):,} parameters on {world_size} rank{'s' * (world_size > 1)}: "
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x data {data}"
        + (f", expert {parallel.expert}" if shape.experts else ""),
        soft_wrap=True,
        highlight=False,
    )
    state_of = "weights, gradients" if config.optimizer.offload else "weights, gradients, Adam"
    stages = Table("stage", "ranks", "layers", "parameters per rank", f"{state_of} (GiB per rank)")
    per_stage = world_size // parallel.pipeline
    for stage in range(parallel.pipeline):
        count = rank_parameters(shape, parallel, stage)
        adapters = adapter_parameters(shape, lora, parallel, stage) if lora else 0
        state = rank_state_bytes(
            count,
            parallel,
            world_size,
            bf16=config.model.dtype == "bf16",
            distributed_optimizer=config.optimizer.distributed,
            offload=config.optimizer.offload,
            adapters=adapters,
        )
        ranks = _spans(list(range(stage * per_stage, (stage + 1) * per_stage)))
        layers = _spans(list(stage_layers(shape.layers, parallel, stage)))
        shown = f"{count.total:,}" + (f" + {adapters:,} of adapters" if lora else "")
        stages.add_row(str(stage), ranks, layers, shown, f"{state / 2**30:.3f}")
    console.print(stages)

    places = Table("rank", "tensor", "context", "data", "pipeline", *(["expert"] if shape.experts else []))
    for place in rank_layout(parallel, world_size)[:RANKS_SHOWN]:
        coordinates = [place.rank, place.tensor, place.context, place.data, place.pipeline]
        places.add_row(*map(str, [*coordinates, place.expert] if shape.experts else coordinates))
    console.print(places)
    if world_size > RANKS_SHOWN:
        console.print(f"... and {world_size - RANKS_SHOWN} more ranks in the same order")


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 6, 7] -> '0-2, 6-7'"""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
