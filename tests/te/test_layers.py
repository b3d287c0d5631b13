"""Policies of Transformer Engine's layers, over stand-ins for its kernels: weights, logprobs, layouts, Adam."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import AlgorithmConfig, GateConfig, ParallelConfig, TrainingConfig
from tests.parallel.layout_job import run_layout
from tests.policy import training
from tests.te import jobs
from tests.tiny_models import FAMILIES

TP = {"tensor": 2, "sequence": True}
PP = {"pipeline": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
EP = {"expert": 2}
CP = {"context": 2}
LAYERS = 4  # two stages of two chunks
EXPERTS = {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
GTPO = AlgorithmConfig(gate=GateConfig(mode="off"))
TRAINING = TrainingConfig(steps=1, micro_batch_tokens=96)


@cache
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


def assert_those_of(path: Path, weights: dict[str, np.ndarray], case: str) -> None:
    """Every tensor of the checkpoint, and no other, bit for bit."""
    stored = load_file(path / "model.safetensors")
    assert weights.keys() == stored.keys(), case
    for name, tensor in stored.items():
        np.testing.assert_array_equal(weights[name], tensor.numpy(), err_msg=f"{case} {name}")


# by world: every family alone, sharded, and in two stages of two chunks; every other axis with some
LAYOUTS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [(family, {}) for family in FAMILIES],
    2: [
        *((family, layout) for family in FAMILIES for layout in (TP, VPP)),
        ("qwen2_tied", PP),
        ("qwen3", CP),
        ("qwen3_moe", EP),
    ],
    4: [
        ("llama3", CP | TP),
        ("qwen2_tied", TP | PP),
        ("qwen3", TP | VPP),
        ("qwen3_moe", EP | TP),
        ("qwen3_moe", EP | PP),
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_weights_are_exact_and_logprobs_those_of_transformers(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, world: int
) -> None:
    cases = [
        (jobs.run_config(tmp_path, te_checkpoint(family, LAYERS), parallel=parallel),)
        for family, parallel in LAYOUTS[world]
    ]
    results = te_ranks.run(world, jobs.each, jobs.logprobs, cases)[0]
    for (family, parallel), (kinds, found, exported) in zip(LAYOUTS[world], results, strict=True):
        path = te_checkpoint(family, LAYERS)
        case = f"{family} {parallel}"
        assert {*jobs.LAYERS, *(EXPERTS if family == "qwen3_moe" else ())} <= kinds, case
        assert_those_of(path, exported, case)
        np.testing.assert_allclose(
            np.concatenate(found), np.concatenate(by_transformers(path)), atol=1e-5, rtol=0, err_msg=case
        )


def test_logprobs_in_bf16_are_as_near_to_transformers_as_the_local_layers(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path
) -> None:
    paths = [te_checkpoint(family, LAYERS) for family in ("llama", "qwen2", "qwen3")]
    cases = [
        (jobs.run_config(tmp_path, path, layers, model={"dtype": "bf16"}),)
        for path in paths
        for layers in ("transformer_engine", "local")
    ]
    found = [np.concatenate(case[1]) for case in te_ranks.run(1, jobs.each, jobs.logprobs, cases)[0]]
    exact = [np.concatenate(by_transformers(path)) for path in paths]
    engine, local = (
        np.mean([np.abs(own - one).mean() for own, one in zip(found[start::2], exact, strict=True)])
        for start in (0, 1)
    )
    assert 0 < engine < 1.1 * local


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


# by world: (family, layout, whether the optimizer is distributed)
TRAINED: dict[int, list[tuple[str, dict[str, Any], bool]]] = {
    2: [
        ("qwen3", TP, False),
        ("qwen3", PP, False),
        ("qwen3", VPP, False),
        ("qwen3", CP, False),
        ("qwen3", {}, True),
        ("qwen3_moe", TP, False),
        ("qwen3_moe", EP, False),
    ],
    4: [("qwen3", TP | PP, True), ("qwen3", CP | TP, False), ("qwen3_moe", EP | PP, False)],
}


@pytest.mark.parametrize("world", TRAINED)
def test_a_layout_trains_as_one_process(te_ranks: Any, te_checkpoint: Any, world: int) -> None:
    """Loss, gradients and updated weights of a step of GTPO."""

    def arguments(family: str, parallel: dict[str, Any], distributed: bool) -> tuple[Any, ...]:
        path, layout = te_checkpoint(family, LAYERS), ParallelConfig(**parallel)
        return path, layout, TRAINING, GTPO, distributed, False, "transformer_engine"

    families = sorted({family for family, *_ in TRAINED[world]})
    alone = [arguments(family, {}, False) for family in families]
    expected = dict(zip(families, te_ranks.run(1, jobs.each, run_layout, alone)[0], strict=True))
    cases = [arguments(*case) for case in TRAINED[world]]
    results = te_ranks.run(world, jobs.each, run_layout, cases)[0]
    for case, found in zip(TRAINED[world], results, strict=True):
        assert_same_step(found, expected[case[0]], str(case))


def assert_same_step(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), case
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), case
    for kind in ("gradients", "weights"):
        if found[kind] is None:  # a distributed optimizer leaves no rank a whole gradient
            continue
        scale = np.linalg.norm([np.linalg.norm(value) for value in expected[kind].values()])
        for name, value in expected[kind].items():
            assert np.linalg.norm(found[kind][name] - value) < 1e-5 * scale, f"{case} {kind} {name}"
