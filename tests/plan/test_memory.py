"""Activations against a real model's saved tensors; what a stage holds; parts of a rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.plan.layout import hf_shape
from gtpo_megatron.plan.memory import HEAD_WORKSPACE, chunks_in_flight, layer_elements
from tests.parallel.pool import RankPool
from tests.plan.saved_tensors import saved_bytes
from tests.tiny_models import make_tiny_checkpoint

TOKENS = 256
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_checkpoint(tmp_path_factory.mktemp(family), family, **SIZES)
        return made[family]

    return make


@pytest.mark.parametrize(
    ("family", "parallel", "recompute"),
    [
        ("llama", {}, "none"),
        ("llama", {}, "selective"),
        ("llama", {}, "full"),
        ("llama", {"tensor": 2}, "none"),
        ("llama", {"tensor": 2, "sequence": True}, "none"),
        ("llama", {"tensor": 2, "sequence": True}, "selective"),
        ("qwen3", {"tensor": 2, "sequence": True}, "none"),
        ("qwen3_moe", {}, "none"),
    ],
    ids=str,
)
def test_activations_are_what_a_real_model_saves(
    family: str,
    parallel: dict,
    recompute: str,
    checkpoints: Callable[[str], Path],
    ranks: RankPool,
) -> None:
    layout = ParallelConfig(**parallel)
    path = checkpoints(family)
    measured = ranks.run(layout.tensor, saved_bytes, path, layout, recompute, TOKENS)[0]["bytes"]
    shape = hf_shape(AutoConfig.from_pretrained(path))
    elements = shape.layers * layer_elements(
        shape, layout.tensor, sequence=layout.sequence, fused=False, recompute=recompute
    )
    # beside the layers: the last norm's input and what it normalises, rotary angles, token ids
    elements += 2 * shape.hidden / (layout.tensor if layout.sequence else 1) + shape.head_dim + 3
    print(f"{family} {parallel} {recompute}: {measured} bytes saved, {elements * 4 * TOKENS:.0f} predicted")
    assert elements * 4 * TOKENS == pytest.approx(measured, rel=0.05)


def test_the_workspace_is_the_heads() -> None:
    from gtpo_megatron.policy.head.tiles import WORKSPACE_BYTES

    assert WORKSPACE_BYTES["cuda"] == HEAD_WORKSPACE


def test_the_first_stage_holds_most_micro_batches() -> None:
    assert [chunks_in_flight(4, 1, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(4, 1, rank, 2) for rank in range(4)] == [2, 2, 2, 1]
    assert [chunks_in_flight(4, 2, rank, 16) for rank in range(4)] == [11, 9, 7, 5]
