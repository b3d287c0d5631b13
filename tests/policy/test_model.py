"""The policy against transformers: token logprobs of every family, the export, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.record import Trajectory
from tests.parallel.pool import RankPool
from tests.tiny_models import FAMILIES, make_tiny_checkpoint

TRAINING = TrainingConfig(steps=1)
BUDGET = 150  # tokens of a micro-batch: several sequences share one, and there are several
TEMPERATURE = 0.7


def sequences(vocabulary: int) -> list[Trajectory]:
    """Random tokens of the whole vocabulary; the longest goes beyond the original range of the tests' Llama-3 rope."""
    rng = np.random.default_rng(0)
    batch = []
    for index, (prompt, length) in enumerate([(5, 3), (1, 20), (40, 50), (12, 1)]):
        ids = rng.integers(0, vocabulary, prompt + length).astype(np.int32)
        ids[-1] = vocabulary - 1
        batch.append(
            Trajectory(
                step=0,
                group=0,
                index=index,
                prompt_id="",
                prompt_ids=ids[:prompt],
                token_ids=ids[prompt:],
                logprobs=np.zeros(length, np.float32),
                token_versions=np.zeros(length, np.int32),
                finish_reason="stop",
            )
        )
    return batch


@torch.no_grad()
def transformers_logprobs(checkpoint: Path, batch: list[Trajectory]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    result = []
    for t in batch:
        ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.token_ids])).long()
        logprobs = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        before = torch.arange(len(t.prompt_ids) - 1, len(ids) - 1)
        result.append(logprobs[before, ids[before + 1]].numpy())
    return result


def logprobs_and_export(
    checkpoint: Path, parallel: ParallelConfig, vocabulary: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray], int]:
    """Token logprobs, exported weights, and the vocabulary rows of this rank."""
    from gtpo_megatron.policy.model import build_policy, export_hf_weights, initialize_parallel, output_weight
    from gtpo_megatron.policy.step import token_logprobs

    initialize_parallel(parallel, seed=0)
    policy = build_policy(ModelConfig(path=str(checkpoint), dtype="fp32"), parallel, TRAINING)
    values = token_logprobs(policy, sequences(vocabulary), parallel, BUDGET, temperature=TEMPERATURE)
    weights = {name: tensor.numpy().copy() for name, tensor in export_hf_weights(policy)}
    return values, weights, output_weight(policy.last_stage).size(0)


def assert_equals_transformers(checkpoint: Path, found: list[np.ndarray], vocabulary: int) -> None:
    expected = transformers_logprobs(checkpoint, sequences(vocabulary))
    assert [len(values) for values in found] == [len(values) for values in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=2e-5)


def assert_exported(checkpoint: Path, weights: dict[str, np.ndarray]) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert weights.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(weights[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_export_of_a_family(
    family: str, ranks: RankPool, tiny_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = tiny_checkpoint(family)
    ((values, weights, _),) = ranks.run(1, logprobs_and_export, checkpoint, ParallelConfig(), 320)
    assert_equals_transformers(checkpoint, values, 320)
    assert_exported(checkpoint, weights)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_a_vocabulary_that_tensor_parallelism_does_not_divide(
    family: str, ranks: RankPool, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, family, vocab_size=321)
    results = ranks.run(2, logprobs_and_export, checkpoint, ParallelConfig(tensor=2), 321)
    for values, weights, rows in results:
        assert rows == 161
        assert_equals_transformers(checkpoint, values, 321)
        assert_exported(checkpoint, weights)


def build_error(checkpoint: Path) -> str:
    from gtpo_megatron.policy.model import build_policy, initialize_parallel

    initialize_parallel(ParallelConfig(), seed=0)
    try:
        build_policy(ModelConfig(path=str(checkpoint), dtype="fp32"), ParallelConfig(), TRAINING)
    except UserError as error:
        return str(error)
    return ""


def test_a_rope_that_would_run_silently_wrong_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    (message,) = ranks.run(1, build_error, checkpoint)
    assert "rope_type 'linear' is not supported; supported: default, llama3" in message


def test_an_architecture_that_the_bridge_does_not_know_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OPTForCausalLM"))
    (message,) = ranks.run(1, build_error, checkpoint)
    assert "model.path" in message and "OPTForCausalLM" in message


def buffers(checkpoint: Path, trained: bool) -> tuple[bool, bool]:
    """Whether any parameter has a gradient buffer, and whether any is to be trained."""
    from gtpo_megatron.policy.model import build_policy, initialize_parallel

    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=0)
    model = ModelConfig(path=str(checkpoint), dtype="fp32")
    policy = build_policy(model, parallel, TrainingConfig(steps=1), trained=trained)
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    return any(hasattr(p, "main_grad") for p in parameters), any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_policy_has_no_gradient_buffers(
    ranks: RankPool, tiny_checkpoint: Callable[[str], Path], trained: bool
) -> None:
    assert ranks.run(1, buffers, tiny_checkpoint("llama"), trained) == [(trained, trained)]
