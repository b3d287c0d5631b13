"""Count the collectives of a training step: one rank of a world of any size, in one process, on torch's fake process group.

The real step runs (this project's policy, Megatron's schedule, the update) in the real layout, with the recipe's number of
layers, on a narrow model and short sequences. Nothing is received from anybody, so no number that the step computes means
anything; which collectives it calls, over which ranks and how large, does not depend on those numbers. The control plane
(what ranks say to each other in Python objects) is left out. Experts' exchanges are as large as the router's numbers say: here
it sends every expert as many tokens, and every other rank is taken to send what this one does.
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

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.communication import step_collectives
from gtpo_megatron.plan.estimate import layout_of
from gtpo_megatron.plan.facts import of_shape
from gtpo_megatron.plan.layout import HFShape, data_parallel_size, rank_layout
from gtpo_megatron.plan.work import Work
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
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


@dataclass(frozen=True)
class Collective:
    """A kind of call: what, over which ranks, and of which type. A pair of pipeline stages counts as a group of them all."""

    kind: str
    group: str  # by the name in _group_names
    ranks: int
    dtype: str


@dataclass(frozen=True)
class Volume:
    """How often in a step, and the bytes of the whole tensors: an all-gather's output, a reduce-scatter's or an all-to-all's input."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class Batch:
    """A batch of equal sequences: every micro-batch of every replica has as many tokens."""

    completions: int
    prompt: int  # tokens
    completion: int
    budget: int  # tokens of a micro-batch


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
        return func(*args, **(kwargs or {}))  # the fake group gathers what this rank has, from every rank

    def _take(self, kind: str, place: int, args: tuple) -> None:
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        tensors = [t for t in tree_leaves(args[place]) if isinstance(t, torch.Tensor)]
        for received in [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]:
            if kind in ("receive", "all_to_all"):
                self._fill(received)
        if group.size() == 1 or kind == "receive":  # the other end of a send
            return
        ranks = self.pipeline if kind == "send" else group.size()
        name = "pipeline" if kind == "send" else self.names[group.group_name]
        found = Collective(kind, name, ranks, str(tensors[0].dtype).removeprefix("torch."))
        self.calls[found] += 1
        self.bytes[found] += sum(t.nbytes for t in tensors)

    def _fill(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.tensor(self.shape)) if tensor.dtype == torch.int64 else tensor.zero_()

    def volumes(self) -> dict[Collective, Volume]:
        """What was counted, the largest first."""
        ordered = sorted(self.calls, key=lambda c: -self.bytes[c])
        return {c: Volume(self.calls[c], self.bytes[c]) for c in ordered}


def _group_names() -> dict[str, str]:
    """What Megatron's groups are for, by the name that torch gave each: two of the same ranks are told apart."""
    from megatron.core import parallel_state as state

    groups = {
        "world": dist.group.WORLD,
        "model": state.get_model_parallel_group(),
        "embedding": state.get_embedding_group(check_initialized=False),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "expert data": state.get_expert_data_parallel_group(),
        "expert tensor": state.get_expert_tensor_parallel_group(),
        "expert": state.get_expert_model_parallel_group(),
        "expert and tensor": state.get_expert_tensor_and_model_parallel_group(),
        "expert model": state.get_expert_tensor_model_pipeline_parallel_group(),
        "optimizer": state.get_intra_distributed_optimizer_instance_group(check_initialized=False),
        "data": state.get_data_parallel_group(with_context_parallel=True),
        "context": state.get_context_parallel_group(),
        "tensor": state.get_tensor_model_parallel_group(),
    }
    return {group.group_name: name for name, group in groups.items() if group}


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
def even_experts() -> Iterator[None]:
    """The router sends token i to the experts from k i on, k in number: each gets as many tokens, if the counts divide."""
    from megatron.core.transformer.moe.router import TopKRouter

    real = TopKRouter.gating

    def gating(router: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = real(router, hidden)
        chosen, experts = router.config.moe_router_topk, logits.size(-1)
        token, first = torch.arange(logits.numel() // experts)[:, None], torch.arange(experts)
        bonus = 1e4 * ((first - chosen * token) % experts < chosen)
        return logits + bonus.to(logits.dtype).view_as(logits)

    with mock.patch.object(TopKRouter, "gating", gating):
        yield


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
    config: RunConfig, batch: Batch, *, rank: int, world: int, scoring: bool = False
) -> dict[Collective, Volume]:
    """The collectives of one rank in one step on policy: a forward and backward pass, and the update; or of a pass that scores."""
    parallel, optimizer = config.parallel, config.optimizer
    with rank_of(rank, world, parallel):
        from gtpo_megatron.policy import step
        from gtpo_megatron.policy.model import build_policy
        from gtpo_megatron.policy.optimizer import apply_update, build_optimizer

        policy = build_policy(
            config.model,
            parallel,
            config.training,
            trained=not scoring,
            distributed_optimizer=optimizer.distributed,
            load_weights=False,
        )
        megatron = None if scoring else build_optimizer(optimizer, policy, steps=10)
        completions = equal_sequences(batch)
        micro_batches = step.pack(policy, completions, parallel, batch.budget)
        tokens = {b.tokens.numel() for b in micro_batches}
        if len(tokens) != 1:
            raise ValueError(f"micro-batches of {sorted(tokens)} tokens: stages are told one shape")
        rows = tokens.pop() // (parallel.tensor if parallel.sequence else 1)
        objective = step.batch_objective(config.algorithm, BatchTable.of(completions), 1.0)
        shape = (rows, 1, policy.config.hidden_size)
        with (
            mock.patch.object(step, "_collect", _collect_nothing),
            even_experts(),
            Counting(shape, parallel.pipeline) as counting,
        ):
            if scoring:
                step.score(policy, micro_batches, batch.completions)
            else:
                step.forward_backward(policy, micro_batches, objective, batch.completions)
                update = apply_update(megatron, policy, 0.0)
        if not scoring and not update.applied:
            raise RuntimeError("the update was skipped: its collectives were not counted")
        return counting.volumes()


def _collect_nothing(data: list[dict[str, Any]], _: int) -> Any:
    """What is summed over context-parallel ranks; the rest is the control plane's."""
    from gtpo_megatron.policy import step

    if data:
        step._own_report(data)
    return step.PassResult(0.0, {}, {})


def planned_step(
    config: RunConfig, shape: HFShape, batch: Batch, *, stage: int, world: int, scoring: bool = False
) -> dict[tuple[str, str, str], float]:
    """The planner's bytes of that step on a rank of a pipeline stage, by kind, group and type."""
    length = batch.prompt + batch.completion
    work = Work(
        row=length,
        rows=batch.budget // length,
        micro_batches=batch.completions
        // data_parallel_size(config.parallel, world)
        // (batch.budget // length),
        recompute=config.training.recompute,
        forward_only=scoring,
        frozen=config.model.lora is not None,
        answered=batch.completion / length,
    )
    planned = step_collectives(of_shape(shape, ""), layout_of(config, world), work, stage)
    return {(c.kind, c.group, c.dtype): c.bytes for c in planned}


def is_left_out(collective: Collective, volume: Volume) -> bool:
    """Whether the planner leaves it out: whole numbers, scalars, and sums over a completion."""
    return (
        collective.dtype == "int64"
        or volume.bytes <= 8 * volume.calls
        or (collective.group, collective.kind) == ("context", "all_reduce")
    )


def count_recipe(recipe: Path, source: Path, world: int) -> dict[str, Any]:
    """Counts of a recipe's step on the first rank of each pipeline stage beside the planner's, and what was made smaller for it."""
    config = load_recipe(recipe, [f"model.path={source}", "model.layers=local"])
    completions = config.rollout.prompts_per_step * config.rollout.group_size
    real = Batch(completions, 256, 1792, config.training.micro_batch_tokens)
    batch = Batch(completions, real.prompt // SHORTER, real.completion // SHORTER, real.budget // SHORTER)
    whole = read_shape(str(source))
    with tempfile.TemporaryDirectory() as folder:
        path = str(narrow_model(Path(folder), source))
        model = config.model.model_copy(update={"path": path, "tokenizer": None})
        small, shape = config.model_copy(update={"model": model}), read_shape(path)
        stages = []
        for place in rank_layout(config.parallel, world):
            if place.tensor == place.context == place.data == 0:
                counted = count_step(small, batch, rank=place.rank, world=world)
                stage = {"stage": place.pipeline, "world": world}
                planned = planned_step(small, shape, batch, **stage)
                full = planned_step(config, whole, real, **stage)
                rows = [_row(c, v, planned, full) for c, v in counted.items()]
                calls = sum(v.calls for v in counted.values())
                stages.append(
                    {"stage": place.pipeline, "rank": place.rank, "calls": calls, "collectives": rows}
                )
    return _described(recipe, whole, config, world, real) | {"stages": stages}


def _row(
    collective: Collective,
    counted: Volume,
    planned: dict[tuple[str, str, str], float],
    full: dict[tuple[str, str, str], float],
) -> dict[str, Any]:
    key = (collective.kind, collective.group, collective.dtype)
    both = {"planned_bytes": round(planned[key]), "full_bytes": round(full[key])} if key in planned else {}
    return asdict(collective) | asdict(counted) | {"planned_bytes": None, "full_bytes": None} | both


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
            "planned_bytes": "of the small tensors, by gtpo_megatron/plan/communication.py; null: not planned (whole numbers, "
            "scalars)",
            "full_bytes": "the same of the real model and the real batch",
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
