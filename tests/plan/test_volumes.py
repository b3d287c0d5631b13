"""The planner's communication volumes against the collectives that a real step calls, counted in a world of one process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.facts import GPU, efficiency, find_gpu, of_shape
from gtpo_megatron.plan.layout import rank_parameters
from gtpo_megatron.plan.time import Layout, Work, step_time

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "fixtures" / "configs" / "Llama-3.1-70B-Instruct"
LAYERS, HIDDEN, VOCABULARY, TOKENS, MICRO_BATCHES = 4, 64, 128, 64, 4
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "tensor": (2, {"tensor": 2}, False),
    "sequence": (2, {"tensor": 2, "sequence": True}, False),
    "data": (4, {}, True),
    "data-whole": (4, {}, False),
    "pipeline": (2, {"pipeline": 2}, False),
    "context": (2, {"context": 2}, False),
    "interleaved": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}, True),
}


def count(path: Path, hidden: int) -> dict[str, Any]:
    """All layouts' volumes of rank 0: runs in a process of its own, which becomes a rank of many worlds."""
    from tools.count_collectives import Batch, count_step, narrow_model

    narrow_model(path, SOURCE, num_hidden_layers=LAYERS, hidden_size=hidden)
    model = ModelConfig(path=str(path), dtype="bf16", layers="local")
    training = TrainingConfig(steps=1, micro_batch_tokens=TOKENS)
    found = {}
    for name, (world, sizes, distributed) in LAYOUTS.items():
        parallel, optimizer = ParallelConfig(**sizes), OptimizerConfig(distributed=distributed)
        replicas = world // (parallel.tensor * parallel.pipeline * parallel.context)
        batch = Batch(2 * MICRO_BATCHES * replicas, 8, 24, TOKENS)
        found[name] = count_step(
            model, parallel, training, AlgorithmConfig(), optimizer, batch, rank=0, world=world
        )
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Volumes by layout, at a width."""

    @cache
    def at(hidden: int = HIDDEN) -> dict[str, Any]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(count, tmp_path_factory.mktemp("model"), hidden).result()

    return at


def sent_bytes(volumes: dict[Any, Any], group: str, dtype: str, kind: str | None = None) -> float:
    """Bytes that a rank sends over a group, in rings."""
    from tools.count_collectives import sent

    return sum(
        sent(c, v)
        for c, v in volumes.items()
        if (c.group, c.dtype) == (group, dtype) and kind in (None, c.kind)
    )


def planned_bytes(folder: Path, layout: Layout) -> dict[str, float]:
    """The planner's seconds on links of one byte a second, all of it exposed: bytes."""
    gpu: GPU = replace(find_gpu("h100-sxm"), nvlink=1.0, network=1.0, node=64)
    reached = replace(
        efficiency(), nvlink=1.0, network=1.0, exposed_tensor=1.0, exposed_context=1.0, exposed_data=1.0
    )
    model = of_shape(read_shape(str(folder)), "")
    work = Work(row=TOKENS, rows=1, micro_batches=MICRO_BATCHES)
    time = step_time(model, gpu, layout, work, reached)
    return {"tensor": time.tensor, "context": time.context, "data": time.data}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.count_collectives import narrow_model

    return narrow_model(tmp_path_factory.mktemp("shape"), SOURCE, num_hidden_layers=LAYERS)


ONCE = (
    HIDDEN * TOKENS * 2 * MICRO_BATCHES / 2
)  # a gather or a reduction of hidden states over two ranks, in a step


def test_tensor_parallelism_is_four_all_reduces_a_layer_and_one_at_each_end(
    counted: Any, folder: Path
) -> None:
    found = sent_bytes(counted()["tensor"], "tensor", "bfloat16")
    planned = planned_bytes(folder, Layout(2, tensor=2))["tensor"]
    assert planned == 8 * LAYERS * ONCE
    assert (
        found == planned + 2 * 2 * ONCE
    )  # the embedding forward, the head backward: the planner leaves them out


def test_sequence_parallelism_gathers_two_inputs_of_a_layer_again(counted: Any, folder: Path) -> None:
    found = sent_bytes(counted()["sequence"], "tensor", "bfloat16")
    planned = planned_bytes(folder, Layout(2, tensor=2))["tensor"]
    assert found == planned + 2 * LAYERS * ONCE + 4 * ONCE


def test_distributed_gradients_are_summed_in_fp32_and_parameters_gathered_in_bf16(
    counted: Any, folder: Path
) -> None:
    layout, volumes = Layout(4), counted()["data"]
    found = sum(sent_bytes(volumes, "data", d) for d in ("float32", "bfloat16"))
    parameters = rank_parameters(read_shape(str(folder)), ParallelConfig(), 0).total
    assert found == pytest.approx(6 * parameters * 3 / 4, rel=0.001)  # buffers are padded
    # the planner knows an average stage, of which the input embedding and the norms are left out, and no (n - 1) / n
    left_out = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    assert planned_bytes(folder, layout)["data"] == 6 * (parameters - left_out)


def test_without_the_distributed_optimizer_a_third_more_is_sent(counted: Any) -> None:
    apart, whole = (
        sum(sent_bytes(counted()[name], "data", d) for d in ("float32", "bfloat16"))
        for name in ("data", "data-whole")
    )
    assert whole == pytest.approx(apart * 8 / 6, rel=0.001)


def test_a_stage_sends_the_hidden_states_of_each_micro_batch_once(counted: Any) -> None:
    assert sent_bytes(counted()["pipeline"], "pipeline", "bfloat16") == 2 * ONCE


def test_context_parallelism_of_the_local_layers_gathers_and_reduces(counted: Any, folder: Path) -> None:
    """Two thirds of the planner's ring, which sends keys and values round again in the backward pass."""
    found = sent_bytes(counted()["context"], "context", "bfloat16")
    assert found == pytest.approx(planned_bytes(folder, Layout(2, context=2))["context"] * 2 / 3)


def test_hidden_states_grow_with_the_width(counted: Any) -> None:
    """As the full bytes of docs/results/collectives-llama-3.1-70b-1024.json say of tensors in bf16."""
    for group in ("tensor", "pipeline"):
        narrow, wide = (
            sent_bytes(counted(h)["interleaved"], group, "bfloat16") for h in (HIDDEN, 2 * HIDDEN)
        )
        assert wide == 2 * narrow > 0
    calls = [{c: v.calls for c, v in counted(h)["interleaved"].items()} for h in (HIDDEN, 2 * HIDDEN)]
    assert calls[0] == calls[1]
