"""Policies of Transformer Engine's layers, over stand-ins for its kernels: weights, logprobs, layouts, Adam."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.policy import training
from tests.te import jobs


def by_transformers(path: Path) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Logprobs of the batch, and weights, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for t in training.batch(0):
        ids = torch.tensor(np.concatenate([t.prompt_ids, t.token_ids])).long()
        with torch.no_grad():
            rows = model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(-1, ids[len(t.prompt_ids) :, None])[:, 0].numpy())
    return found, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen2", {"tensor": 2, "sequence": True}),
    ],
)
def test_weights_are_exact_and_logprobs_those_of_transformers(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, family: str, parallel: dict[str, Any]
) -> None:
    path = te_checkpoint(family)
    config = jobs.run_config(tmp_path, path, parallel=parallel)
    layers, found, exported = te_ranks.run(parallel.get("tensor", 1), jobs.logprobs, config)[0]
    assert layers == sorted(jobs.LAYERS)
    expected, weights = by_transformers(path)
    assert exported.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
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


def test_two_tensor_ranks_train_as_one(te_ranks: Any, te_checkpoint: Any, tmp_path: Path) -> None:
    path = te_checkpoint("llama")
    one, two = (
        te_ranks.run(size, jobs.train, jobs.run_config(tmp_path, path, parallel=parallel), 2)[0][0]
        for size, parallel in ((1, {}), (2, {"tensor": 2, "sequence": True}))
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)
