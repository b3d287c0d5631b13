"""Count the collectives of a training step: one rank of a world of any size, in one process, on torch's fake process group.

The real step runs (this project's policy, Megatron's schedule, the update) in the real layout, with the recipe's number of
layers, on a narrow model and short sequences. Nothing is received from anybody, so no number that the step computes means
anything; which collectives it calls, over which ranks and how large, does not depend on those numbers. The control plane
(what ranks say to each other in Python objects) is left out, and so are mixtures of experts, whose exchanges are as large
as the router's numbers say.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gtpo_megatron.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.layout import HFShape, data_parallel_size, rank_layout, rank_parameters
from gtpo_megatron.policy import platform
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable

RECIPE = Path("recipes/large/llama-3.1-70b-math-bf16.yaml")
SHAPE = Path("tests/fixtures/configs/Llama-3.1-70B-Instruct")
NARROW = {  # what a model is shrunk to; the layers stay
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 128,
}
SHORTER = 64  # times as short are the sequences
# operator of torch.distributed -> what it is called here, and the place of its whole tensor (the larger of input and output)
OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}
PAIRWISE = ("send", "receive")


@dataclass(frozen=True)
class Collective:
    """A kind of call: what, over which ranks, and of which type. A pair of pipeline stages counts as a group of them all."""

    kind: str
    group: (
        str  # tensor, context, data (with context), pipeline, embedding, model (tensor and pipeline), world
    )
    ranks: int
    dtype: str


@dataclass(frozen=True)
class Volume:
    """How often in a step, and the bytes of the whole tensors: an all-gather's output, a reduce-scatter's input."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class Batch:
    """A batch of equal sequences: every micro-batch of every replica has as many tokens."""

    completions: int
    prompt: int  # tokens
    completion: int
    budget: int  # tokens of a micro-batch


def sent(collective: Collective, volume: Volume) -> float:
    """Bytes that a rank sends for it in a ring, the algorithm that gtpo_megatron/plan/time.py prices."""
    if collective.kind in PAIRWISE:
        return volume.bytes if collective.kind == "send" else 0
    share = (collective.ranks - 1) / collective.ranks
    return volume.bytes * {"all_reduce": 2 * share, "broadcast": 1}.get(collective.kind, share)


class Counting(TorchDispatchMode):
    """Counts torch.distributed's operators, of groups of more than one rank, while it is entered.

    What nobody sends is filled in: shapes that pipeline stages exchange with `shape`, all else with zeros.
    """

    def __init__(self, shape: Sequence[int], pipeline: int) -> None:
        super().__init__()
        self.shape, self.pipeline = tuple(shape), pipeline
        self.names = _group_names()
        self.calls: Counter[Collective] = Counter()
        self.bytes: Counter[Collective] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            if name not in OPERATORS:
                raise NotImplementedError(f"a step calls {name}, which is not counted")
            self._take(*OPERATORS[name], args)
        return func(*args, **(kwargs or {}))

    def _take(self, kind: str, place: int, args: tuple) -> None:
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        tensors = [t for t in tree_leaves(args[place]) if isinstance(t, torch.Tensor)]
        if kind in ("receive", "all_gather"):
            for tensor in tensors:
                self._fill(tensor)
        if group.size() == 1:
            return
        ranks = self.pipeline if kind in PAIRWISE else group.size()
        members = tuple(dist.get_process_group_ranks(group))
        name = "pipeline" if kind in PAIRWISE else self.names[members]
        found = Collective(kind, name, ranks, str(tensors[0].dtype).removeprefix("torch."))
        self.calls[found] += 1
        self.bytes[found] += sum(t.nbytes for t in tensors)

    def _fill(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.tensor(self.shape)) if tensor.dtype == torch.int64 else tensor.zero_()

    def volumes(self) -> dict[Collective, Volume]:
        """What was counted, the largest first."""
        ordered = sorted(self.calls, key=lambda c: -self.bytes[c])
        return {c: Volume(self.calls[c], self.bytes[c]) for c in ordered}


def _group_names() -> dict[tuple[int, ...], str]:
    """Names of Megatron's groups by their ranks; of groups with the same ranks the last one gives the name."""
    from megatron.core import parallel_state as state

    groups = {
        "world": dist.group.WORLD,
        "model": state.get_model_parallel_group(),
        "embedding": state.get_embedding_group(check_initialized=False),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "data": state.get_data_parallel_group(with_context_parallel=True),
        "context": state.get_context_parallel_group(),
        "tensor": state.get_tensor_model_parallel_group(),
    }
    return {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items() if group}


def narrow_model(directory: Path, source: Path, **changes: Any) -> Path:
    """A config.json in `directory` like that in `source`, with NARROW's sizes and the changes. There are no weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | NARROW | changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def equal_sequences(batch: Batch) -> list[Trajectory]:
    """As many completions as the batch has, all of one length."""
    length = batch.completion
    return [
        Trajectory(
            step=0,
            group=index // 2,
            index=index % 2,
            prompt_id=str(index // 2),
            prompt_ids=np.full(batch.prompt, 5, np.int32),
            token_ids=np.full(length, 7, np.int32),
            logprobs=np.full(length, -1, np.float32),
            token_versions=np.zeros(length, np.int32),
            finish_reason="stop",
            reward=float(index % 2),
            advantage=index % 2 - 0.5,
        )
        for index in range(batch.completions)
    ]


@contextmanager
def rank_of(rank: int, world: int, parallel: ParallelConfig) -> Iterator[None]:
    """Be that rank of a world in which nobody else is."""
    platform.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    from megatron.core import parallel_state

    from gtpo_megatron.policy.model import initialize_parallel

    real = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> dist.ProcessGroup:
        return real(*args, **kwargs | {"backend": "fake"})  # Megatron asks for some over gloo

    try:
        with mock.patch.object(dist, "new_group", fake_group):
            initialize_parallel(parallel, seed=0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def count_step(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    algorithm: AlgorithmConfig,
    optimizer: OptimizerConfig,
    batch: Batch,
    *,
    rank: int,
    world: int,
) -> dict[Collective, Volume]:
    """The collectives of one rank in one step on policy: a forward and backward pass, and the update."""
    with rank_of(rank, world, parallel):
        from gtpo_megatron.policy import step
        from gtpo_megatron.policy.model import build_policy
        from gtpo_megatron.policy.optimizer import apply_update, build_optimizer

        def collect(data: list[dict[str, Any]], _: int) -> step.PassResult:
            if data:
                step._own_report(
                    data
                )  # what it sums over context-parallel ranks; the rest is the control plane's
            return step.PassResult(0.0, {}, {})

        policy = build_policy(
            model, parallel, training, distributed_optimizer=optimizer.distributed, load_weights=False
        )
        megatron = build_optimizer(optimizer, policy, steps=10)
        completions = equal_sequences(batch)
        micro_batches = step.pack(policy, completions, parallel, batch.budget)
        tokens = {b.tokens.numel() for b in micro_batches}
        if len(tokens) != 1:
            raise ValueError(f"micro-batches of {sorted(tokens)} tokens: stages are told one shape")
        rows = tokens.pop() // (parallel.tensor if parallel.sequence else 1)
        objective = step.batch_objective(algorithm, BatchTable.of(completions), 1.0)
        shape = (rows, 1, policy.config.hidden_size)
        with mock.patch.object(step, "_collect", collect), Counting(shape, parallel.pipeline) as counting:
            step.forward_backward(policy, micro_batches, objective, batch.completions)
            update = apply_update(megatron, policy, 0.0)
        if not update.applied:
            raise RuntimeError("the update was skipped: its collectives were not counted")
        return counting.volumes()


def full_bytes(collective: Collective, counted: Volume, factor: int, parameters: int) -> int | None:
    """Bytes at the model's real width and the batch's real length; None where they are not computed.

    Hidden states (bf16, over tensor-parallel ranks and between stages) grow with tokens times width, their shapes with
    nothing; gradients (fp32) and parameters (bf16) over replicas are the rank's parameters, without padding.
    """
    if collective.dtype == "int64":
        return counted.bytes
    if collective.dtype == "bfloat16" and collective.group in ("tensor", "pipeline"):
        return counted.bytes * factor
    if collective.group == "data" and collective.kind in ("reduce_scatter", "all_gather"):
        return parameters * {"float32": 4, "bfloat16": 2}[collective.dtype]
    return None


def count_recipe(recipe: Path, source: Path, world: int) -> dict[str, Any]:
    """Counts of a recipe's step on the first rank of each pipeline stage, and what was made smaller for it."""
    config = load_recipe(recipe, [])
    parallel, whole = config.parallel, read_shape(str(source))
    completions = config.rollout.prompts_per_step * config.rollout.group_size
    real = Batch(completions, 256, 1792, config.training.micro_batch_tokens)
    batch = Batch(completions, real.prompt // SHORTER, real.completion // SHORTER, real.budget // SHORTER)
    places = [p for p in rank_layout(parallel, world) if p.tensor == p.context == p.data == 0]
    factor = SHORTER * whole.hidden // NARROW["hidden_size"]
    stages = []
    with tempfile.TemporaryDirectory() as folder:
        path = narrow_model(Path(folder), source)
        model = config.model.model_copy(update={"path": str(path), "tokenizer": None})
        for place in places:
            counted = count_step(
                model,
                parallel,
                config.training,
                config.algorithm,
                config.optimizer,
                batch,
                rank=place.rank,
                world=world,
            )
            parameters = rank_parameters(whole, parallel, place.pipeline).total
            rows = [
                asdict(c) | asdict(v) | {"full_bytes": full_bytes(c, v, factor, parameters)}
                for c, v in counted.items()
            ]
            calls = sum(v.calls for v in counted.values())
            stages.append({"stage": place.pipeline, "rank": place.rank, "calls": calls, "collectives": rows})
    return _described(recipe, whole, config, world, real) | {"stages": stages}


def _described(recipe: Path, whole: HFShape, config: Any, world: int, real: Batch) -> dict[str, Any]:
    replicas = data_parallel_size(config.parallel, world)
    return {
        "recipe": recipe.as_posix(),
        "ranks": world,
        "made_by": "tools/count_collectives.py",
        "layout": config.parallel.model_dump() | {"data": replicas},
        "layers": whole.layers,
        "torch": torch.__version__,
        "batch": asdict(real) | {"sequences_of_a_replica": real.completions / replicas},
        "scaled_down": {
            "model": {"from": asdict(whole), "to": NARROW},
            "tokens_of_every_sequence_and_budget": f"1/{SHORTER}",
            "left_as_they_are": "layout, ranks, layers, number of sequences and of micro-batches, types",
            "bytes": "of the small tensors, as counted",
            "full_bytes": "hidden states: counted bytes times tokens and width; gradients and parameters over replicas: "
            "the rank's real parameters; null: not computed",
            "equal_sequences": "all sequences are as long as each other, so that every micro-batch is full; a real batch "
            "may need more micro-batches",
            "not_counted": "the control plane (Python objects), weights to servers, checkpoints, the scoring pass of the "
            "first step",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--shape", type=Path, default=SHAPE, help="folder with the model's config.json")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = count_recipe(arguments.recipe, arguments.shape, arguments.ranks)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
