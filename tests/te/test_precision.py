"""What `make gpu` measures of each number format, over stand-ins: the same function, as far as a machine without a GPU can."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import precision

WORK = precision.Work(groups=2, group_size=2, completion=40, micro_batch_tokens=256, steps=2)
FP8 = [name for name in precision.VARIANTS if name.startswith("fp8")]


@pytest.fixture(scope="module")
def measured(te_ranks: Any, te_checkpoint: Any) -> dict[str, precision.Measured]:
    path: Path = te_checkpoint("qwen2_tied", 4)
    return {name: te_ranks.run(1, precision.measure, name, path, WORK)[0] for name in precision.VARIANTS}


def test_bf16_by_transformer_engine_is_near_the_local_layers(measured: dict[str, Any]) -> None:
    local, engine = measured["local-bf16"], measured["bf16"]
    assert (local.layers, engine.layers) == ("ColumnParallelLinear", "TELayerNormColumnParallelLinear")
    assert engine.adam.endswith("FusedAdam")
    assert precision.gap(engine.logprobs, local.logprobs)["mean_abs"] < 0.02


@pytest.mark.parametrize("name", FP8)
def test_each_fp8_format_is_further_from_bf16_but_not_far(measured: dict[str, Any], name: str) -> None:
    rounded = precision.gap(measured["bf16"].logprobs, measured["local-bf16"].logprobs)["mean_abs"]
    gap = precision.gap(measured[name].logprobs, measured["local-bf16"].logprobs)
    assert rounded < gap["mean_abs"] < 0.2
    assert gap["mean_abs"] <= gap["p99_abs"] <= gap["max_abs"]
    assert np.isfinite(measured[name].losses).all() and np.isfinite(measured[name].grad_norms).all()
    assert measured[name].grad_norms[0] == pytest.approx(measured["bf16"].grad_norms[0], rel=0.3)


def test_layers_left_in_bf16_bring_it_nearer(measured: dict[str, Any]) -> None:
    whole, inner = (
        precision.gap(measured[name].logprobs, measured["local-bf16"].logprobs)["mean_abs"]
        for name in ("fp8-tensorwise", "fp8-tensorwise-edges-bf16")
    )
    assert inner < whole
