"""Checkpoints of policies of Transformer Engine's layers and its Adam: a resumed run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.policy.test_checkpoint import load_and_go_on, save_and_go_on
from tests.te import jobs

TENSORWISE = {"format": "hybrid"}
BLOCKWISE = {"format": "e4m3", "recipe": "blockwise"}
DELAYED = {"format": "hybrid", "recipe": "delayed"}


@pytest.mark.parametrize(
    ("family", "distributed", "model"),
    [
        pytest.param("llama", False, {"dtype": "fp32"}, id="fp32"),
        pytest.param("llama", False, {"dtype": "bf16", "fp8": TENSORWISE}, id="tensorwise"),
        pytest.param("llama", True, {"dtype": "bf16", "fp8": BLOCKWISE}, id="blockwise-distributed"),
        pytest.param("llama", False, {"dtype": "bf16", "fp8": DELAYED}, id="delayed"),
        pytest.param(
            "llama", False, {"dtype": "bf16", "fp8": TENSORWISE | {"param": True}}, id="weights-in-fp8"
        ),
        pytest.param(
            "llama",
            True,
            {"dtype": "bf16", "fp8": TENSORWISE | {"param": True}},
            id="weights-in-fp8-distributed",
        ),
        pytest.param(
            "llama",
            True,
            {"dtype": "bf16", "fp8": BLOCKWISE | {"param": True}},
            id="weights-in-fp8-blockwise-distributed",
        ),
        pytest.param("qwen3_moe", False, {"dtype": "bf16", "fp8": DELAYED}, id="experts-delayed"),
        pytest.param(
            "qwen3_moe", True, {"dtype": "bf16", "fp8": TENSORWISE}, id="experts-tensorwise-distributed"
        ),
    ],
)
def test_resume_is_exact(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, family: str, distributed: bool, model: dict[str, Any]
) -> None:
    config = jobs.run_config(
        tmp_path, te_checkpoint(family), model=model, optimizer={"distributed": distributed}
    )
    metrics, weights, _ = te_ranks.run(1, save_and_go_on, config)[0]
    resumed, resumed_weights, _, _ = te_ranks.run(1, load_and_go_on, config)[0]
    assert resumed == metrics
    for name, weight in weights.items():
        np.testing.assert_array_equal(resumed_weights[name], weight, err_msg=name)


def test_scales_are_read_in_another_layout(te_ranks: Any, te_checkpoint: Any, tmp_path: Path) -> None:
    """Saved by one process, read by two stages: each takes those of its layers."""
    model = {"dtype": "bf16", "fp8": DELAYED}
    alone, staged = (
        jobs.run_config(tmp_path, te_checkpoint("llama"), model=model, parallel=parallel)
        for parallel in ({}, {"pipeline": 2})
    )
    te_ranks.run(1, save_and_go_on, alone)
    stored = load_file(alone.path / "checkpoints" / "latest" / "fp8.safetensors")
    assert any((value != 1).any() for name, value in stored.items() if name.endswith(".scale"))
    first, second = te_ranks.run(2, jobs.loaded_scales, staged)
    assert {name.split(".")[0] for name in first} == {"layer1"}
    assert {name.split(".")[0] for name in second} == {"layer2"}
    found = first | second
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)
