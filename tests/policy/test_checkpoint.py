"""Saving and loading: continued training equals uninterrupted training, in the same layout and in others."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.policy import training


def save_and_go_on(config: Any, more: int = 2) -> tuple[list, dict[str, np.ndarray], list[float]]:
    """Two steps, a checkpoint, and `more` steps: what the later steps gave."""
    multiprocessing.current_process()._config["daemon"] = (
        False  # an asynchronous save forks; pool workers may not
    )
    policy, optimizer, checkpointer = training.start(config)
    training.steps(config, policy, optimizer, range(2))
    checkpointer.save(training.state(2))
    noise = torch.rand(3).tolist()
    metrics = training.steps(config, policy, optimizer, range(2, 2 + more))
    checkpointer.finish()
    return metrics, training.weights(policy), noise


def load_and_go_on(config: Any, more: int = 2) -> tuple[list, dict[str, np.ndarray], list[float], Any]:
    policy, optimizer, checkpointer = training.start(config)
    loaded = checkpointer.load_latest()
    noise = torch.rand(3).tolist()
    metrics = training.steps(config, policy, optimizer, range(2, 2 + more))
    return metrics, training.weights(policy), noise, loaded


SINGLE: dict[str, Any] = {}
SAVED_AS = [
    pytest.param(SINGLE, False, "fp32", id="single"),
    pytest.param({"tensor": 2, "pipeline": 2}, True, "fp32", id="tp2-pp2-distributed"),
    pytest.param({}, True, "bf16", id="dp2-distributed-bf16"),
]


@pytest.mark.parametrize(("parallel", "distributed", "dtype"), SAVED_AS)
def test_resume_in_the_same_layout_is_exact(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path, parallel: dict, distributed: bool, dtype: str
) -> None:
    config = training.run_config(
        tmp_path,
        tiny_checkpoint("qwen2"),
        parallel=parallel,
        optimizer={"distributed": distributed},
        model={"dtype": dtype},
    )
    world = 4 if parallel else 2 if distributed else 1
    expected = ranks.run(world, save_and_go_on, config)
    found = ranks.run(world, load_and_go_on, config)
    for (metrics, weights, noise), (metrics_2, weights_2, noise_2, loaded) in zip(
        expected, found, strict=True
    ):
        assert metrics_2 == metrics
        assert noise_2 == noise
        assert loaded == training.state(2)
        for name in weights:
            np.testing.assert_array_equal(weights_2[name], weights[name], err_msg=name)


LAYOUTS = [
    pytest.param(
        "qwen2_tied", (4, {"tensor": 2, "pipeline": 2}, True), (1, {}, False), id="tp2-pp2-dist-to-single"
    ),
    pytest.param(
        "qwen2", (1, {}, False), (4, {"tensor": 2, "pipeline": 2}, True), id="single-to-tp2-pp2-dist"
    ),
    pytest.param(
        "llama", (2, {}, True), (2, {"pipeline": 2, "virtual_pipeline": 2}, False), id="dp2-dist-to-vpp2"
    ),
    pytest.param(
        "qwen3_moe",
        (2, {"expert": 2}, True),
        (2, {"tensor": 2, "sequence": True}, False),
        id="ep2-dist-to-tp2",
    ),
]


@pytest.mark.parametrize(("family", "saved", "loaded"), LAYOUTS)
def test_resume_in_another_layout(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path, family: str, saved: tuple, loaded: tuple
) -> None:
    def config(layout: tuple) -> Any:
        return training.run_config(
            tmp_path, tiny_checkpoint(family), parallel=layout[1], optimizer={"distributed": layout[2]}
        )

    metrics, weights, _ = ranks.run(saved[0], save_and_go_on, config(saved))[0]
    metrics_2, weights_2, _, state = ranks.run(loaded[0], load_and_go_on, config(loaded))[0]
    np.testing.assert_allclose(metrics_2, metrics, rtol=1e-5)
    assert state == training.state(2)
    for name in weights:
        # Whole tensors, because Adam makes much of a gradient that is rounding alone, as single elements' may be. The
        # key bias' all is: attention does not depend on it. Lost moments show: they move
        # every element by about the learning rate, 0.01.
        if not name.endswith("k_proj.bias"):
            moved = np.linalg.norm(weights_2[name] - weights[name])
            assert moved < 1e-4 * np.linalg.norm(weights[name]), name


def test_asynchronous_save_holds_the_weights_of_its_moment(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    config = training.run_config(
        tmp_path, tiny_checkpoint("llama"), checkpoint={"asynchronous": True}, optimizer={"distributed": True}
    )
    expected = ranks.run(2, save_and_go_on, config)
    found = ranks.run(2, load_and_go_on, config)
    assert [m for m, *_ in found] == [m for m, *_ in expected]


def save_often(config: Any) -> list[str]:
    policy, optimizer, checkpointer = training.start(config)
    for step in range(1, 7):
        training.steps(config, policy, optimizer, range(step - 1, step))
        checkpointer.save(training.state(step))
    return sorted(path.name for path in (config.path / "checkpoints").iterdir())


def test_the_last_and_every_kth_are_kept(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = training.run_config(
        tmp_path, tiny_checkpoint("llama"), checkpoint={"keep_last": 2, "keep_every": 3}
    )
    (names,) = ranks.run(1, save_often, config)
    assert names == ["latest", "step-000003", "step-000005", "step-000006"]
    latest = config.path / "checkpoints" / "latest"
    assert latest.resolve().name == "step-000006"
    assert {p.name for p in latest.iterdir()} == {
        "manifest.json",
        "state.json",
        "rng.safetensors",
        "weights",
        "config.yaml",
        "versions.json",
        "hf",
    }
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {
        p.name for p in (latest / "hf").iterdir()
    }


def load_nothing(config: Any) -> Any:
    return training.start(config)[2].load_latest()


def test_no_checkpoint_is_a_new_run(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    assert ranks.run(1, load_nothing, training.run_config(tmp_path, tiny_checkpoint("llama"))) == [None]
