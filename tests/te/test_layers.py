"""Policies of Transformer Engine's layers, over stand-ins for its kernels: weights, logprobs, layouts, Adam."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.plan.layout import smallest_world
from tests.parallel.layout_job import run_layout
from tests.policy import training
from tests.te import jobs


def world_of(parallel: dict[str, Any]) -> int:
    """The fewest ranks of a layout."""
    return smallest_world(ParallelConfig(**parallel))


def by_transformers(path: Path) -> list[np.ndarray]:
    """Logprobs of the batch in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for t in training.batch(0):
        ids = torch.tensor(np.concatenate([t.prompt_ids, t.token_ids])).long()
        with torch.no_grad():
            rows = model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(-1, ids[len(t.prompt_ids) :, None])[:, 0].numpy())
    return found


def assert_those_of(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Every tensor of the checkpoint, and no other, bit for bit."""
    stored = load_file(path / "model.safetensors")
    assert weights.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(weights[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("llama", {}),
        ("llama3", {}),
        ("qwen2", {}),
        ("qwen2", {"tensor": 2, "sequence": True}),
        ("qwen2_tied", {"pipeline": 2}),
        ("qwen3", {}),
    ],
)
def test_weights_are_exact_and_logprobs_those_of_transformers(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, family: str, parallel: dict[str, Any]
) -> None:
    path = te_checkpoint(family)
    config = jobs.run_config(tmp_path, path, parallel=parallel)
    layers, found, exported = te_ranks.run(world_of(parallel), jobs.logprobs, config)[0]
    assert layers == sorted(jobs.LAYERS)
    assert_those_of(path, exported)
    expected = by_transformers(path)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-5, rtol=0)


def test_four_steps_of_its_adam_are_torchs(
    te_ranks: Any, ranks: Any, te_checkpoint: Any, tmp_path: Path
) -> None:
    path = te_checkpoint("llama")
    (engine, adam, weights), (local, other_adam, other_weights) = (
        pool.run(1, jobs.train, jobs.run_config(tmp_path, path, layers), 4)[0]
        for pool, layers in ((te_ranks, "transformer_engine"), (ranks, "local"))
    )
    assert "transformer_engine" in adam and adam.endswith("FusedAdam") and other_adam.startswith("torch.")
    assert local[-1][0] < local[0][0]
    np.testing.assert_allclose(engine, local, rtol=2e-5)
    for name, weight in other_weights.items():
        moved = np.linalg.norm(weights[name] - weight)
        assert moved < 1e-4 * np.linalg.norm(weight), name


@pytest.mark.parametrize(
    ("family", "layers", "parallel"),
    [
        ("qwen2", 4, {"pipeline": 2, "virtual_pipeline": 2}),
        ("qwen3", 2, {"context": 2, "tensor": 2, "sequence": True}),
        ("qwen2_tied", 2, {"tensor": 2, "pipeline": 2}),
        ("qwen3_moe", 2, {}),
        ("qwen3_moe", 2, {"expert": 2}),
        ("qwen3_moe", 2, {"expert": 2, "tensor": 2, "sequence": True}),
        ("qwen3_moe", 2, {"expert": 2, "pipeline": 2}),
    ],
)
def test_weights_come_out_as_they_went_in(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, family: str, layers: int, parallel: dict[str, Any]
) -> None:
    """Layouts whose forward pass has no stand-in: attention over context ranks, and the permutation of experts."""
    path = te_checkpoint(family, layers)
    config = jobs.run_config(tmp_path, path, parallel=parallel)
    kinds, weights = te_ranks.run(world_of(parallel), jobs.export, config)[0]
    experts = {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    assert {*jobs.LAYERS[:1], *(experts if family == "qwen3_moe" else ())} <= kinds
    assert_those_of(path, weights)


@pytest.mark.parametrize(
    ("parallel", "distributed"),
    [({"tensor": 2, "sequence": True}, False), ({"pipeline": 2}, False), ({}, True)],
    ids=["tp2-sp", "pp2", "dp2-distributed-optimizer"],
)
def test_two_ranks_train_as_one(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, parallel: dict[str, Any], distributed: bool
) -> None:
    """Loss, gradients and updated weights of a step of GTPO."""
    path, training = te_checkpoint("qwen3"), TrainingConfig(steps=1, micro_batch_tokens=96)
    algorithm = AlgorithmConfig(gate=GateConfig(mode="off"))
    one, two = (
        te_ranks.run(
            size,
            run_layout,
            path,
            ParallelConfig(**layout),
            training,
            algorithm,
            sharded,
            False,
            "transformer_engine",
        )[0]
        for size, layout, sharded in ((1, {}, False), (2, parallel, distributed))
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    for kind in ("gradients", "weights"):
        found, expected = two[kind], one[kind]
        if found is None:  # a distributed optimizer leaves no rank a whole gradient
            continue
        scale = np.linalg.norm([np.linalg.norm(value) for value in expected.values()])
        for name, value in expected.items():
            assert np.linalg.norm(found[name] - value) < 1e-5 * scale, f"{kind} {name}"
