"""Loss, every parameter's gradient, and the updated weights: each layout against one process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ParallelConfig, TrainingConfig
from tests.parallel.layout_job import LEARNING_RATE, fp32_is, run_layout
from tests.parallel.pool import RankPool
from tests.tiny_models import make_tiny_checkpoint

GTPO = AlgorithmConfig(gate=GateConfig(mode="off"))
TRAINING = TrainingConfig(steps=1, micro_batch_tokens=96)
EPSILON = float(np.finfo(np.float32).eps)

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
    "pp2-vpp2-dp2-overlapped": (4, dict(pipeline=2, virtual_pipeline=2), dict(overlap_grad_reduce=True)),
    "pp2-dp2-overlapped-distributed-optimizer": (
        4,
        dict(pipeline=2),
        dict(overlap_grad_reduce=True, distributed_optimizer=True),
    ),
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
    return ranks.run(
        1, run_layout, checkpoint, ParallelConfig(), TRAINING, GTPO, False, float64, layers(float64)
    )[0]


def layers(float64: bool) -> str:
    """Transformer Engine has no float64."""
    return "local" if float64 else "auto"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, ranks: RankPool, checkpoint: Callable[[str], Path]) -> None:
    world, parallel, options = LAYOUTS[layout]
    compare(ranks, checkpoint("qwen3"), world, parallel, options, float64=False)


# a distributed optimizer leaves no whole gradient on a rank, and Megatron has none in float64
@pytest.mark.local_layers("no float64")
@pytest.mark.parametrize(
    "layout", [name for name, (_, _, options) in LAYOUTS.items() if "distributed_optimizer" not in options]
)
def test_layout_equals_one_process_in_float64(
    layout: str, ranks: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    world, parallel, options = LAYOUTS[layout]
    compare(ranks, checkpoint("qwen3"), world, parallel, options, float64=True)
    # these processes train other tests' policies next, which once were of float64 without a word
    assert ranks.run(world, fp32_is) == ["torch.float32"] * world


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen2_tied"])
def test_family_on_tp2_pp2(family: str, ranks: RankPool, checkpoint: Callable[[str], Path]) -> None:
    for float64 in (True, False):
        compare(ranks, checkpoint(family), 4, dict(tensor=2, pipeline=2), {}, float64)


@pytest.mark.parametrize(
    "world, parallel, options",
    [
        (2, dict(expert=2), {}),
        (4, dict(expert=2, pipeline=2), {}),
        (4, dict(expert=2), dict(overlap_grad_reduce=True)),
    ],
)
def test_mixture_of_experts(
    world: int, parallel: dict[str, int], options: dict, ranks: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    compare(ranks, checkpoint("qwen3_moe"), world, parallel, options, float64=False)


def compare(
    ranks: RankPool, checkpoint: Path, world: int, parallel: dict, options: dict, float64: bool
) -> None:
    expected = one_process(ranks, checkpoint, float64)
    options = dict(options)
    distributed = options.pop("distributed_optimizer", False)
    training = TRAINING.model_copy(update=options)
    results = ranks.run(
        world,
        run_layout,
        checkpoint,
        ParallelConfig(**parallel),
        training,
        GTPO,
        distributed,
        float64,
        layers(float64),
    )
    for result in results:  # every rank knows the loss and the statistics
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-9 if float64 else 1e-6)
        for key, values in expected["completions"].items():
            np.testing.assert_allclose(result["completions"][key], values, rtol=2e-6, atol=1e-6, err_msg=key)
        if not float64:
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert all(result["tokens"] is None for result in results[1:])
    for name, bound in (("logprobs", 2e-6), ("entropies", 2**-7)):  # entropies are rounded to bfloat16
        for own, one in zip(results[0]["tokens"][name], expected["tokens"][name], strict=True):
            np.testing.assert_allclose(own, one, rtol=bound, atol=bound, err_msg=name)
    exact = one_process(ranks, checkpoint, True)["gradients"]
    bounds = gradient_bounds(expected["gradients"], exact, float64)
    if results[0]["gradients"] is not None:
        assert_same("gradient", results[0]["gradients"], expected["gradients"], bounds)
    if results[0]["weights"] is not None:  # Adam's first step with eps 1 moves a weight by lr g / (|g| + 1)
        bounds = {
            name: LEARNING_RATE * bounds[name] + 2 * EPSILON * np.linalg.norm(value)
            for name, value in expected["weights"].items()
        }
        assert_same("weight", results[0]["weights"], expected["weights"], bounds)


def gradient_bounds(
    values: dict[str, np.ndarray], exact: dict[str, np.ndarray], float64: bool
) -> dict[str, float]:
    """How far (norm of the difference) a layout's gradient may be from one process's, by name.

    Float64: 1e-9 of the gradient, for the layouts compute the same. Float32: what the tensor's own arithmetic loses,
    which is the distance of one process from float64; the layout errs as much in another direction (root 2), and 4
    covers the spread of two draws. The measured distance knows what a multiple of the gradient's norm does not: where
    terms cancel. The worst case is a key's bias. Without rotary embedding its gradient would be 0 exactly (softmax
    ignores what all keys share); with it, the dimensions that turn slowly still cancel, and rounding is that of the terms.
    """
    if float64:
        return {name: 1e-9 * float(np.linalg.norm(value)) for name, value in exact.items()}
    return {
        name: 4 * max(float(np.linalg.norm(values[name] - value)), EPSILON * float(np.linalg.norm(value)))
        for name, value in exact.items()
    }


def assert_same(
    kind: str, values: dict[str, np.ndarray], expected: dict[str, np.ndarray], bounds: dict[str, float]
) -> None:
    """Every tensor within its bound, and all together to 1e-6."""
    assert values.keys() == expected.keys()
    square, total = 0.0, 0.0
    for name, value in values.items():
        difference = np.linalg.norm(value.astype(np.float64) - expected[name])
        assert difference <= bounds[name], f"{kind} {name}: {difference:.2e} > {bounds[name]:.2e}"
        square += difference**2
        total += np.linalg.norm(expected[name].astype(np.float64)) ** 2
    assert square <= (1e-6) ** 2 * total
