"""Loss, every parameter's gradient, and the updated weights: each layout against one process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ParallelConfig, TrainingConfig
from tests.parallel.layout_job import run_layout
from tests.parallel.pool import RankPool
from tests.tiny_models import make_tiny_checkpoint

GTPO = AlgorithmConfig(gate=GateConfig(mode="off"))
TRAINING = TrainingConfig(steps=1, micro_batch_tokens=96)

LAYOUTS = {
    "tp2": (2, dict(tensor=2), {}),
    "tp2-sp": (2, dict(tensor=2, sequence=True), {}),
    "pp2": (2, dict(pipeline=2), {}),
    "pp2-vpp2": (2, dict(pipeline=2, virtual_pipeline=2), {}),
    "cp2": (2, dict(context=2), {}),
    "dp2": (2, dict(), {}),
    "dp2-distributed-optimizer": (2, dict(), dict(distributed_optimizer=True)),
    "tp2-pp2": (4, dict(tensor=2, pipeline=2), {}),
    "tp2-pp2-sp-distributed-optimizer": (
        4,
        dict(tensor=2, pipeline=2, sequence=True),
        dict(distributed_optimizer=True),
    ),
    "tp2-cp2-sp": (4, dict(tensor=2, context=2, sequence=True), {}),
    "pp2-vpp2-dp2": (4, dict(pipeline=2, virtual_pipeline=2), {}),
    "pp2-cp2": (4, dict(pipeline=2, context=2), {}),
    "recompute-full": (1, dict(), dict(recompute="full")),
    "recompute-selective-tp2": (2, dict(tensor=2), dict(recompute="selective")),
    "other-micro-batches": (1, dict(), dict(micro_batch_tokens=400)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of a usual scale of initialisation: with the large one of other tests, rounding alone exceeds 1e-6."""
    return cache(
        lambda family: make_tiny_checkpoint(tmp_path_factory.mktemp(family), family, initializer_range=0.04)
    )


@cache
def one_process(ranks: RankPool, checkpoint: Path, float64: bool) -> dict[str, Any]:
    return ranks.run(1, run_layout, checkpoint, ParallelConfig(), TRAINING, GTPO, False, float64)[0]


@pytest.mark.parametrize("float64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(
    layout: str, float64: bool, ranks: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    world, parallel, options = LAYOUTS[layout]
    if float64 and "distributed_optimizer" in options:
        pytest.skip(
            "a distributed optimizer leaves no whole gradient on a rank, and Megatron has none in float64"
        )
    compare(ranks, checkpoint("qwen3"), world, parallel, options, float64)


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen2_tied"])
def test_family_on_tp2_pp2(family: str, ranks: RankPool, checkpoint: Callable[[str], Path]) -> None:
    compare(ranks, checkpoint(family), 4, dict(tensor=2, pipeline=2), {}, float64=False)


@pytest.mark.parametrize("world, parallel", [(2, dict(expert=2)), (4, dict(expert=2, pipeline=2))])
def test_mixture_of_experts(
    world: int, parallel: dict[str, int], ranks: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    compare(ranks, checkpoint("qwen3_moe"), world, parallel, {}, float64=False)


def compare(
    ranks: RankPool, checkpoint: Path, world: int, parallel: dict, options: dict, float64: bool
) -> None:
    expected = one_process(ranks, checkpoint, float64)
    options = dict(options)
    distributed = options.pop("distributed_optimizer", False)
    training = TRAINING.model_copy(update=options)
    results = ranks.run(
        world, run_layout, checkpoint, ParallelConfig(**parallel), training, GTPO, distributed, float64
    )
    for result in results:  # every rank knows the loss and the statistics
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-9 if float64 else 1e-6)
        for key, values in expected["completions"].items():
            np.testing.assert_allclose(result["completions"][key], values, rtol=2e-6, atol=1e-6, err_msg=key)
        if not float64:
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    for kind in ("gradients", "weights"):
        if results[0][kind] is not None:
            assert_same(kind, results[0][kind], expected[kind], float64)


def assert_same(
    kind: str, values: dict[str, np.ndarray], expected: dict[str, np.ndarray], float64: bool
) -> None:
    """In float64 every tensor to 1e-9: the layouts compute the same. In float32 all together to 1e-6, and each tensor to
    4e-6: the rounding of one process alone is 1e-6 of the smaller ones, as its distance from float64 shows."""
    assert values.keys() == expected.keys()
    square, total = 0.0, 0.0
    for name, value in values.items():
        difference = np.linalg.norm(value.astype(np.float64) - expected[name])
        norm = np.linalg.norm(expected[name].astype(np.float64))
        assert difference <= (1e-9 if float64 else 4e-6) * norm, f"{kind} {name}: {difference / norm:.2e}"
        square, total = square + difference**2, total + norm**2
    assert square <= (1e-6) ** 2 * total
