"""The planner's communication against the collectives that a real step calls, counted in a world of one process: by kind and group."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.communication import stage_parameters, step_collectives
from gtpo_megatron.plan.estimate import layout_of
from gtpo_megatron.plan.facts import of_shape
from gtpo_megatron.plan.layout import HFShape, data_parallel_size, rank_parameters
from gtpo_megatron.plan.work import Work

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
RECIPE = ROOT / "recipes" / "large" / "llama-3.1-70b-math-bf16.yaml"
RECORD = ROOT / "docs" / "results" / "collectives-llama-3.1-70b-1024.json"
DENSE, BIASED, MIXTURE = "Llama-3.1-70B-Instruct", "Qwen2.5-32B-Instruct", "Qwen3-30B-A3B"
NORMED = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS, ROW, MICRO_BATCHES = 4, 64, 2
BUCKETS = (
    0.02  # gradient buffers begin each tensor, some of 8 elements, and end each bucket at round addresses
)
ANSWERS = 0.1  # a completion has not quite as many tokens on each context-parallel rank


@dataclass(frozen=True)
class Case:
    """A model in a layout, and the rank that is counted."""

    model: str
    world: int
    rank: int = 0
    scoring: bool = False
    settings: tuple[str, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()


def case(
    model: str, world: int, *settings: str, rank: int = 0, scoring: bool = False, **changes: Any
) -> Case:
    """Settings by their names in `parallel`, or whole."""
    named = tuple(s if "." in s else f"parallel.{s}" for s in settings)
    return Case(model, world, rank, scoring, named, tuple(changes.items()))


FULL, WHOLE = "training.recompute=full", "optimizer.distributed=false"
STAGES = ("tensor=2", "sequence=true", "pipeline=4", "virtual_pipeline=null")
CASES = {
    "tensor": case(DENSE, 2, "tensor=2"),
    "tensor, normed queries": case(BIASED, 2, "tensor=2", **NORMED),
    "tensor, recomputed": case(DENSE, 2, "tensor=2", FULL),
    "sequence": case(DENSE, 2, "tensor=2", "sequence=true"),
    "sequence, normed queries": case(BIASED, 2, "tensor=2", "sequence=true", **NORMED),
    "sequence, biases": case(BIASED, 4, "tensor=2", "sequence=true"),
    "sequence, attention recomputed": case(
        DENSE, 2, "tensor=2", "sequence=true", "training.recompute=selective"
    ),
    "sequence, recomputed": case(DENSE, 2, "tensor=2", "sequence=true", FULL),
    "sequence, scored": case(DENSE, 2, "tensor=2", "sequence=true", scoring=True),
    "data": case(DENSE, 4),
    "data, whole optimizers": case(DENSE, 4, WHOLE),
    "data, overlapped": case(DENSE, 4, "training.overlap_grad_reduce=true"),
    "context": case(DENSE, 4, "context=2"),
    "context, recomputed": case(DENSE, 2, "context=2", FULL),
    "stage, first": case(DENSE, 8, *STAGES),
    "stage, inner": case(DENSE, 8, *STAGES, rank=4),
    "stage, last": case(DENSE, 8, *STAGES, rank=6),
    "stage, last, scored": case(DENSE, 8, *STAGES, rank=6, scoring=True),
    "stages with one embedding": case(DENSE, 4, "pipeline=2", rank=3, tie_word_embeddings=True),
    "interleaved": case(DENSE, 8, "tensor=2", "sequence=true", "pipeline=2", "virtual_pipeline=2"),
    "all": case(
        DENSE, 32, "tensor=2", "sequence=true", "pipeline=2", "virtual_pipeline=2", "context=2", rank=20
    ),
    "experts": case(MIXTURE, 4, "expert=4"),
    "experts, whole optimizers": case(MIXTURE, 8, "expert=4", WHOLE),
    "experts, recomputed": case(MIXTURE, 4, "expert=2", FULL),
    "experts, scored": case(MIXTURE, 4, "expert=4", scoring=True),
    "experts and tensor": case(MIXTURE, 8, "tensor=2", "sequence=true", "expert=4"),
    "experts split by tensor": case(MIXTURE, 4, "tensor=2", "sequence=true"),
    "experts split by tensor, recomputed": case(MIXTURE, 2, "tensor=2", "sequence=true", FULL),
    "experts, all": case(
        MIXTURE, 32, "tensor=2", "sequence=true", "expert=4", "context=2", "pipeline=2", rank=16
    ),
}


def prepared(folder: Path, name: str) -> tuple[RunConfig, HFShape, Any, int]:
    """Recipe, narrow model, batch and pipeline stage of a case."""
    from tools.count_collectives import Batch, narrow_model

    chosen = CASES[name]
    path = folder / name.replace(" ", "-").replace(",", "")
    path.mkdir(exist_ok=True)
    experts = EXPERTS if chosen.model == MIXTURE else {}
    changes = {"num_hidden_layers": LAYERS} | experts | dict(chosen.changes)
    narrow_model(path, CONFIGS / chosen.model, **changes)
    plain = [f"parallel.{key}=1" for key in ("tensor", "pipeline", "context", "expert")]
    plain += ["parallel.virtual_pipeline=null", "parallel.sequence=false", "training.recompute=none"]
    plain += [f"model.path={path}", "model.layers=local", f"training.micro_batch_tokens={ROW}"]
    config = load_recipe(RECIPE, [*plain, *chosen.settings])
    replicas = data_parallel_size(config.parallel, chosen.world)
    stage = chosen.rank * config.parallel.pipeline // chosen.world
    return config, read_shape(str(path)), Batch(2 * MICRO_BATCHES * replicas, 16, 16, ROW), stage


def count(folder: Path) -> dict[str, Any]:
    """All cases: runs in a process of its own, which becomes a rank of many worlds."""
    from tools.count_collectives import count_step

    found = {}
    for name, chosen in CASES.items():
        config, _, batch, _ = prepared(folder, name)
        found[name] = count_step(config, batch, rank=chosen.rank, world=chosen.world, scoring=chosen.scoring)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def counted(folder: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(count, folder).result()


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_is_planned(name: str, counted: dict[str, Any], folder: Path) -> None:
    """Every kind of call over every group, to the byte; gradient buffers to 2%, for they are padded."""
    from tools.count_collectives import is_left_out, planned_step

    chosen = CASES[name]
    config, shape, batch, stage = prepared(folder, name)
    planned = planned_step(config, shape, batch, stage=stage, world=chosen.world, scoring=chosen.scoring)
    found = {(c.kind, c.group, c.dtype): v.bytes for c, v in counted[name].items() if not is_left_out(c, v)}
    for key in sorted(found.keys() | planned.keys()):
        print(f"{' '.join(key):45} planned {planned.get(key, 0):12,.0f} counted {found.get(key, 0):12,.0f}")
    assert found.keys() == planned.keys()
    for key, value in found.items():
        margin = 1e-9
        if key[1] in ("data", "expert data"):
            margin = BUCKETS
        elif config.parallel.context > 1 and key == ("all_reduce", "tensor", "float32"):
            margin = ANSWERS
        assert planned[key] == pytest.approx(value, rel=margin), key


def test_what_is_left_out_is_next_to_nothing(counted: dict[str, Any]) -> None:
    """In this model of 64 units; at real widths a hundredth of it."""
    from tools.count_collectives import is_left_out

    for name, volumes in counted.items():
        left = sum(v.bytes for c, v in volumes.items() if is_left_out(c, v))
        assert left < 0.03 * sum(v.bytes for v in volumes.values()), name


def test_pipeline_stages_of_real_models_have_the_parameters_that_are_sent() -> None:
    for directory in sorted(CONFIGS.iterdir()):
        shape = read_shape(str(directory))
        for tensor, pipeline, expert in ((1, 1, 1), (2, 2, 1), (2, 2, 4)):
            if shape.layers % pipeline or shape.kv_heads % tensor or (expert > 1 and not shape.experts):
                continue
            parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, sequence=tensor > 1)
            config = load_recipe(RECIPE, [f"model.path={directory}"]).model_copy(
                update={"parallel": parallel}
            )
            for stage in range(pipeline):
                exact = rank_parameters(shape, parallel, stage)
                found = stage_parameters(of_shape(shape, ""), layout_of(config, 16), stage)
                assert found == (exact.dense, exact.expert), (directory.name, parallel, stage)


def test_the_record_of_1024_ranks_agrees_with_the_plan() -> None:
    """Kind by kind, at the size that was counted; and its full bytes are what the planner says today."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    config = load_recipe(RECIPE, [f"model.path={CONFIGS / DENSE}", "model.layers=local"])
    batch = record["batch"]
    length = batch["prompt"] + batch["completion"]
    work = Work(
        length,
        batch["budget"] // length,
        batch["sequences_of_a_replica"] * length / batch["budget"],
        answered=batch["completion"] / length,
    )
    model = of_shape(read_shape(str(CONFIGS / DENSE)), "")
    assert [stage["stage"] for stage in record["stages"]] == [0, 1, 2, 3]
    for stage in record["stages"]:
        full = {
            (c.kind, c.group, c.dtype): c.bytes
            for c in step_collectives(model, layout_of(config, record["ranks"]), work, stage["stage"])
        }
        rows = [row for row in stage["collectives"] if row["planned_bytes"] is not None]
        assert {(r["kind"], r["group"], r["dtype"]): r["full_bytes"] for r in rows} == full
        assert all(r["planned_bytes"] == pytest.approx(r["bytes"], rel=BUCKETS) for r in rows)
        rest = [r for r in stage["collectives"] if r["planned_bytes"] is None]
        assert all(r["bytes"] < 2000 for r in rest)
