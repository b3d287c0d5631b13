"""The plan of a recipe: what a GPU holds and what a step takes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import batch_problems, layout_problems
from gtpo_megatron.plan.communication import Collective, decisive_stages, step_collectives
from gtpo_megatron.plan.facts import GPU, Efficiency, Model, of_shape
from gtpo_megatron.plan.flop import model_flop, scoring_passes
from gtpo_megatron.plan.layout import HFShape, data_parallel_size, smallest_world
from gtpo_megatron.plan.memory import RankMemory, smallest_server, training_memory
from gtpo_megatron.plan.placement import placed_server, together_problems, turn_peaks, turn_seconds
from gtpo_megatron.plan.sampling import MOST, Server, batch_seconds, spread_lengths
from gtpo_megatron.plan.time import (
    UNCERTAINTY,
    StepTime,
    step_time,
    transfer_seconds,
)
from gtpo_megatron.plan.work import Layout, Work

TYPICAL_SHARE = 0.4  # of max_new_tokens that an average completion has, where nothing better is known
TYPICAL_PROMPT = 0.25  # of max_prompt_tokens


@dataclass(frozen=True)
class StepPlan:
    """Seconds of a step. `sampling` is None where it is not modelled; `step` then is training's part alone."""

    training: StepTime
    scoring: float
    sampling: float | None
    transfer: float
    overhead: float  # rewards, packing, logging
    checkpoint: float  # of one that is saved; not part of `step`
    overlapped: bool  # sampling runs beside the rest
    step: float
    tokens: float  # prompts included
    flop_share: float  # model FLOP utilisation while training
    turns: float = 0.0  # memory that changes hands between trainer and servers

    @property
    def limit(self) -> str:
        """What a step waits for most."""
        parts = {
            "sampling": self.sampling or 0.0,
            "training": self.training.total,
            "scoring": self.scoring,
            "weight transfer": self.transfer,
            "overhead": self.overhead,
            "memory in turn with servers": self.turns,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Plan:
    """What is predicted of a recipe on a number of GPUs."""

    gpus: int
    gpu: GPU
    parallel: ParallelConfig
    recompute: str
    memory: tuple[RankMemory, ...]
    step: StepPlan
    collectives: tuple[Collective, ...]  # of a training step, on the stage that sends most
    server: Server | None  # one of them; None where none samples
    servers: int
    uncertainty: dict[str, float]

    @property
    def worst(self) -> RankMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def turns(self) -> dict[str, float]:
        """Bytes on a GPU by turn, where servers share the trainer's; else none."""
        together = self.server is not None and self.worst.server
        return turn_peaks(self.memory, self.server) if together else {}

    @property
    def host_memory(self) -> float:
        """Bytes of a node's host memory that the trainer's ranks there take for the optimizer: of the worst stage, as all were of it."""
        return max(stage.host for stage in self.memory) * min(self.gpus, self.gpu.node)

    @property
    def fits(self) -> bool:
        """With the uncertainty on top."""
        return self.worst.total * (1 + self.uncertainty["memory"]) <= self.gpu.memory

    def as_dict(self) -> dict[str, object]:
        """For JSON: bytes and seconds."""
        worst, step = self.worst, self.step
        return {
            "gpus": self.gpus,
            "gpu": self.gpu.name,
            "parallel": self.parallel.model_dump(),
            "recompute": self.recompute,
            "fits": self.fits,
            "memory": {
                "limit": self.gpu.memory,
                "worst_stage": worst.stage,
                "total": worst.total,
                **worst.parts,
                **({"by_turn": self.turns} if self.turns else {}),
            },
            "host_memory": self.host_memory,
            "seconds": {
                "step": step.step,
                "sampling": step.sampling,
                "training": step.training.total,
                "scoring": step.scoring,
                "transfer": step.transfer,
                "overhead": step.overhead,
                "checkpoint": step.checkpoint,
                "turns": step.turns,
                "training_by_cause": asdict(step.training),
            },
            "limit": step.training.limit,
            "step_limit": step.limit,
            "communication": [asdict(c) | {"bytes": c.bytes, "sent": c.sent} for c in self.collectives],
            "tokens_per_step": step.tokens,
            "mfu_training": step.flop_share,
            "servers": _server_dict(self.server, self.servers),
            "uncertainty": self.uncertainty,
        }


def _server_dict(server: Server | None, count: int) -> dict[str, object] | None:
    """Bytes on a GPU of a server."""
    if server is None:
        return None
    return {
        "count": count,
        "tensor": server.tensor,
        "weights": server.weights,
        "cache": server.cache,
        "left": server.gpu.memory - server.weights - server.cache,
        "cached_tokens": int(server.cached_tokens),
    }


def completion_lengths(config: RunConfig, source: Path | None) -> list[float]:
    """Tokens of completions: of a run's stored trajectories, of a file with one number a line (or a JSON list), or a usual spread.

    Raises:
        UserError: nothing is there, or a length is no positive number; the line is named.
    """
    if source is None:
        count = config.rollout.prompts_per_step * config.rollout.group_size
        longest = config.rollout.max_new_tokens
        return spread_lengths(TYPICAL_SHARE * longest, longest, min(count, MOST))
    if source.is_dir():
        return _run_lengths(source)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lengths: {source}: cannot be read: {error}") from error
    lengths = [_length(item, f"{source}:{line}") for line, item in enumerate(_items(text), 1) if item.strip()]
    if not lengths:
        raise UserError(f"--lengths: {source}: no lengths there; expected tokens of a completion, one a line")
    return lengths


def _items(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            return [str(item) for item in json.loads(text)]
        except ValueError:
            pass  # the first line then is no number, and named
    return text.splitlines()


def _length(item: str, place: str) -> float:
    try:
        value = float(item)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e8:
        raise UserError(f"--lengths: {place}: {item.strip()[:40]!r} is no number of tokens above 0")
    return value


def _run_lengths(run: Path) -> list[float]:
    import pyarrow.parquet as parquet

    files = sorted((run / "trajectories").glob("step-*.parquet"))
    if not files:
        raise UserError(f"--lengths: {run}: no trajectories/step-*.parquet there; give a run's directory")
    try:
        tables = [parquet.read_table(file, columns=["token_ids"]) for file in files[-8:]]
    except (OSError, ValueError) as error:
        raise UserError(f"--lengths: {run}: {str(error).splitlines()[0]}") from error
    lengths = [float(len(ids)) for table in tables for ids in table["token_ids"].to_pylist() if ids]
    if not lengths:
        raise UserError(f"--lengths: {run}: its newest steps hold no completion")
    return lengths


def make_plan(
    config: RunConfig,
    shape: HFShape,
    gpus: int,
    gpu: GPU,
    lengths: Sequence[float],
    reached: Efficiency,
    *,
    sampling: float | None = None,
    serving: int | None = None,
) -> Plan:
    """The plan of a recipe on `gpus` trainer GPUs; servers as the recipe starts them, or as many GPUs as the trainer has.

    `sampling` are seconds that are known already, for plans that differ in the trainer alone. `serving`: GPUs of the servers,
    whatever the recipe says of them.
    """
    work = packed_work(config, gpus, lengths, _sequences(config), reached)
    tensor, servers = server_shape(config, shape, gpus, gpu, serving)
    if sampling is None:
        sampling = sampled_seconds(config, shape, gpus, gpu, lengths, reached, serving)
    memory = training_memory(config, shape, gpus, int(work.micro_batches))
    turns = turn_seconds(config, memory, gpu, reached)
    step = _step(config, shape, gpus, gpu, work, sampling, reached, turns)
    uncertainty = {
        "memory": UNCERTAINTY["memory"],
        "training": UNCERTAINTY["mixture" if shape.experts else "dense"],
        "step": UNCERTAINTY["rl"],
    }
    return Plan(
        gpus,
        gpu,
        config.parallel,
        config.training.recompute,
        memory,
        step,
        _most_sent(of_shape(shape, ""), layout_of(config, gpus), work),
        placed_server(config, shape, gpus, gpu, tensor) if tensor else None,
        servers,
        uncertainty,
    )


def _most_sent(model: Model, layout: Layout, work: Work) -> tuple[Collective, ...]:
    stages = (step_collectives(model, layout, work, stage) for stage in decisive_stages(layout))
    return max(stages, key=lambda stage: sum(c.sent for c in stage))


def server_shape(
    config: RunConfig, shape: HFShape, gpus: int, gpu: GPU, serving: int | None = None
) -> tuple[int, int]:
    """GPUs of a server, and servers: the recipe's own, or of servers by URL the smallest that fit, on as many GPUs as the trainer.

    On `serving` GPUs there are as many as fit; none where that is fewer than a server takes.
    """
    sglang = config.rollout.sglang
    if config.rollout.engine != "sglang" or config.algorithm.name == "sft":
        return 0, 0
    if not (sglang.urls or sglang.urls_file):
        return sglang.tensor, sglang.servers if serving is None else serving // sglang.tensor
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tensor = smallest_server(shape, gpu, longest)
    if not tensor:
        raise UserError(
            f"no server of up to {4 * gpu.node} {gpu.name} holds the model and eight sequences of {longest} tokens; "
            "lower rollout.max_new_tokens or take a GPU with more memory (--gpu)"
        )
    if serving is not None:
        return tensor, serving // tensor
    return tensor, max(1, len(sglang.urls) or gpus // tensor)


def sampled_seconds(
    config: RunConfig,
    shape: HFShape,
    gpus: int,
    gpu: GPU,
    lengths: Sequence[float],
    reached: Efficiency,
    serving: int | None = None,
) -> float | None:
    """Of a step's batch on the servers; None for the embedded engine, whose speed is not modelled, and for SFT."""
    tensor, servers = server_shape(config, shape, gpus, gpu, serving)
    if not tensor:
        return None
    if not servers:
        raise UserError(f"{serving} GPUs hold no server, which takes {tensor}")
    rollout = config.rollout
    prompt = TYPICAL_PROMPT * config.data.max_prompt_tokens
    asked = round(rollout.prompts_per_step * rollout.group_size * rollout.oversample)
    kept = sorted(lengths)[: max(1, round(len(lengths) / rollout.oversample))]  # the longest are given up
    server = placed_server(config, shape, gpus, gpu, tensor)
    return batch_seconds(server, prompt, kept, -(-asked // servers), rollout.sglang.concurrency, reached)


def packed_work(
    config: RunConfig, gpus: int, lengths: Sequence[float], completions: int, reached: Efficiency
) -> Work:
    """What a replica is dealt of a step's batch: rows of packed sequences, as many as the schedule takes.

    Attention grows with the square of a sequence, so that its length stands for the batch by sum of squares over sum.
    """
    parallel = config.parallel
    prompt = TYPICAL_PROMPT * config.data.max_prompt_tokens
    sequences = [length + prompt for length in lengths]
    total = sum(sequences)
    row = max(1, round(sum(x * x for x in sequences) / total))
    tokens = completions * total / len(sequences) / data_parallel_size(parallel, gpus)
    multiple = parallel.pipeline if parallel.virtual_pipeline else 1
    needed = tokens / config.training.micro_batch_tokens / reached.rl_fill
    micro_batches = multiple * ceil(needed / multiple)
    local = config.model.layers == "local"
    return Work(
        row=row,
        rows=tokens / micro_batches / row,
        micro_batches=micro_batches,
        precision="fp8" if config.model.fp8.enabled else "bf16",
        recompute=config.training.recompute,
        torch_attention=local,
        eager=local,
        frozen=config.model.lora is not None,
        offload=config.optimizer.offload,
        answered=sum(lengths) / total,
    )


def _step(
    config: RunConfig,
    shape: HFShape,
    gpus: int,
    gpu: GPU,
    work: Work,
    sampling: float | None,
    reached: Efficiency,
    turns: float,
) -> StepPlan:
    model, algorithm = of_shape(shape, ""), config.algorithm
    layout = layout_of(config, gpus)
    training = step_time(model, gpu, layout, work, reached)
    passes = scoring_passes(algorithm)
    scored = replace(work, recompute="none", forward_only=True)
    scoring = passes * step_time(model, gpu, layout, scored, reached).total if passes else 0.0
    sampled = sampling is not None
    transfer = transfer_seconds(model, gpu, reached) if sampled else 0.0
    own = training.total * algorithm.updates_per_batch + scoring + transfer + turns
    overlapped = sampled and config.rollout.staleness > 0
    step = max(own, sampling or 0.0) if overlapped else own + (sampling or 0.0)
    overhead = reached.step_overhead_s if sampled else 0.0
    tokens = work.row * work.rows * work.micro_batches * layout.data
    share = tokens * model_flop(model, work.row, work.kind) / gpus / training.total / gpu.bf16
    written = model.parameters * (14 if config.model.dtype == "bf16" else 12)
    checkpoint = written / ceil(gpus / gpu.node) / (reached.checkpoint_node_gb_s * 1e9)
    return StepPlan(
        training,
        scoring,
        sampling,
        transfer,
        overhead,
        checkpoint,
        overlapped,
        step + overhead,
        tokens,
        share,
        turns,
    )


def layout_of(config: RunConfig, gpus: int) -> Layout:
    """As the trainer has it: parameters are gathered when the update is done, and gradients during the backward pass if asked for."""
    parallel = config.parallel
    return Layout(
        gpus,
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline or 1,
        parallel.context,
        parallel.expert,
        sequence=parallel.sequence,
        distributed=config.optimizer.distributed,
        ring=config.model.layers != "local",
        overlap_gradients=config.training.overlap_grad_reduce,
        overlap_parameters=False,
    )


def check_layout(config: RunConfig, shape: HFShape, gpus: int) -> None:
    """Raise UserError with every rule of the layout that is broken, and the nearest number of GPUs that works."""
    problems = _problems(config, shape, gpus)
    if not problems and (crowded := together_problems(config, gpus)):
        raise UserError(f"--gpus {gpus}: {crowded[0]}")
    if problems:
        nearest = nearest_gpus(config, shape, gpus)
        hint = f"\n  nearest that works: --gpus {nearest}" if nearest else ""
        raise UserError(f"--gpus {gpus}: " + "\n  ".join(problems) + hint)


def nearest_gpus(config: RunConfig, shape: HFShape, gpus: int) -> int | None:
    """The number of GPUs nearest to `gpus` on which the recipe's layout stands and its batch has a sequence for each replica."""
    parallel, least = config.parallel, smallest_world(config.parallel)
    replica = parallel.tensor * parallel.pipeline * parallel.context
    most = max(1, _sequences(config) * replica // least)
    middle = min(most, max(1, round(gpus / least)))
    for away in range(64):  # a layout that stands on no number of these is wrong in itself
        for times in (middle - away, middle + away):
            if 1 <= times <= most and not _problems(config, shape, times * least):
                return times * least
    return None


def _problems(config: RunConfig, shape: HFShape, gpus: int) -> list[str]:
    return list(layout_problems(config.parallel, shape, gpus)) or list(batch_problems(config, gpus))


def _sequences(config: RunConfig) -> int:
    """Of a step."""
    if config.algorithm.name == "sft":
        return config.training.sft_batch_size
    return config.rollout.prompts_per_step * config.rollout.group_size
