"""apex's fused weight gradient: used where it is installed, and the same gradients as without."""

import logging
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.policy import platform
from tests.parallel.layout_job import run_layout
from tests.parallel.pool import RankPool
from tests.policy import apex_standin

TRAINING = TrainingConfig(steps=1, micro_batch_tokens=96)
GTPO = AlgorithmConfig(gate=GateConfig(mode="off"))


@pytest.fixture(scope="module")
def apex_ranks() -> Iterator[RankPool]:
    pool = RankPool(apex_standin.install)
    yield pool
    pool.close()


@pytest.mark.local_layers("apex's function is called by those")
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}], ids=["single", "tp2-sp"])
def test_gradients_and_weights_are_those_without_it(
    apex_ranks: RankPool,
    ranks: RankPool,
    tiny_checkpoint: Callable[[str], Path],
    parallel: dict[str, int],
) -> None:
    layout = (tiny_checkpoint("qwen2"), ParallelConfig(**parallel), TRAINING, GTPO)
    world = parallel.get("tensor", 1)
    fused, shapes = apex_ranks.run(world, apex_standin.calls_of_a_step, *layout)[0]
    plain = ranks.run(world, run_layout, *layout)[0]
    assert shapes == {
        (128 // world, 64),  # queries, keys and values of 4 + 2 + 2 heads of 16
        (64, 64 // world),  # their output
        (256 // world, 64),  # the MLP's gate and up
        (64, 128 // world),  # and down
    }
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    for kind in ("gradients", "weights"):
        for name, expected in plain[kind].items():
            difference = np.linalg.norm(fused[kind][name] - expected)
            assert difference <= 1e-5 * np.linalg.norm(expected), f"{kind} {name}"


@pytest.mark.parametrize(
    ("cuda", "installed", "used", "said"),
    [
        (True, True, True, "by the product itself (apex's fused_weight_gradient_mlp_cuda is installed)"),
        (
            True,
            False,
            False,
            "then added to their buffer (apex's fused_weight_gradient_mlp_cuda is not installed)",
        ),
        (False, True, False, ""),
    ],
)
def test_it_is_used_where_it_is_found_and_that_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuda: bool,
    installed: bool,
    used: bool,
    said: str,
) -> None:
    monkeypatch.setattr(platform, "HAS_CUDA", cuda)
    module = types.ModuleType(apex_standin.NAME)
    module.__spec__ = ModuleSpec(module.__name__, None)
    if installed:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with caplog.at_level(logging.INFO, "gtpo_megatron"):
        assert platform.use_fused_weight_gradient() is used
    assert said in caplog.text
    assert bool(caplog.text) == cuda
