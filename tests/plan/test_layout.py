"""Rank coordinates and parameter counts against transformers, Megatron's own rank generator, and published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.layout import (
    HFShape,
    data_parallel_size,
    expert_tensor_size,
    hf_shape,
    model_parameters,
    padded_vocab,
    rank_layout,
    rank_parameters,
    rank_state_bytes,
    sequence_alignment,
    smallest_world,
    stage_layers,
)
from gtpo_megatron.policy import platform
from tests.tiny_models import FAMILIES, Family, tiny_config

QWEN3_8B = HFShape("Qwen3ForCausalLM", 36, 4096, 32, 8, 128, 12288, 151936, 40960, tied=False, qk_norm=True)
QWEN25_05B = HFShape("Qwen2ForCausalLM", 24, 896, 14, 2, 64, 4864, 151936, 32768, tied=True, qkv_bias=True)
QWEN3_30B_A3B = HFShape(
    "Qwen3MoeForCausalLM", 48, 2048, 32, 4, 128, 6144, 151936, 40960, False, False, True, 128, 8, 768
)

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"

layouts = st.builds(
    lambda tensor, context, pipeline, expert, replicas: (
        ParallelConfig(tensor=tensor, context=context, pipeline=pipeline, expert=expert),
        tensor * context * pipeline * expert * replicas,
    ),
    *[st.sampled_from([1, 2, 4])] * 4,
    st.sampled_from([1, 2, 3]),
)


def shape_of(family: Family, **overrides: object) -> tuple[HFShape, int]:
    """A tiny model's shape, and the parameters that transformers counts (tied weights once)."""
    config = tiny_config(family, **overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    model.tie_weights()
    return hf_shape(config), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_has_as_many_parameters_as_transformers_counts(family: Family) -> None:
    shape, counted = shape_of(family)
    assert model_parameters(shape) == counted


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [(QWEN3_8B, 8_190_735_360), (QWEN25_05B, 494_032_768), (QWEN3_30B_A3B, 30_532_122_624)],
)
def test_published_sizes(shape: HFShape, parameters: int) -> None:
    assert model_parameters(shape) == parameters


PUBLISHED = {  # parameters, as the hub shows them
    "SmolLM2-135M-Instruct": 134_515_008,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}


def test_the_configs_that_recipes_are_checked_against_have_the_published_sizes() -> None:
    sizes = {folder.name: model_parameters(read_shape(str(folder))) for folder in CONFIGS.iterdir()}
    assert sizes == PUBLISHED


@given(layouts)
@settings(max_examples=60, deadline=None)
def test_coordinates_are_megatrons(layout: tuple[ParallelConfig, int]) -> None:
    platform.install()
    from megatron.core.parallel_state import RankGenerator

    parallel, world = layout
    data = data_parallel_size(parallel, world)
    dense = RankGenerator(
        parallel.tensor, 1, data, parallel.pipeline, parallel.context, order="tp-cp-ep-dp-pp"
    )
    expert_tensor = expert_tensor_size(parallel)
    expert_data = world // (expert_tensor * parallel.expert * parallel.pipeline)
    experts = RankGenerator(
        expert_tensor, parallel.expert, expert_data, parallel.pipeline, 1, order="tp-cp-ep-dp-pp"
    )
    places = rank_layout(parallel, world)
    assert [place.rank for place in places] == list(range(world))
    for generator, token, coordinate in (
        (dense, "tp", "tensor"),
        (dense, "cp", "context"),
        (dense, "dp", "data"),
        (dense, "pp", "pipeline"),
        (experts, "ep", "expert"),
    ):
        for group in generator.get_ranks(token):
            assert [getattr(places[rank], coordinate) for rank in group] == list(range(len(group)))


@given(layouts)
@settings(max_examples=60, deadline=None)
def test_the_smallest_world_holds_the_layout(layout: tuple[ParallelConfig, int]) -> None:
    parallel, world = layout
    smallest = smallest_world(parallel)
    assert smallest <= world
    assert smallest % (parallel.tensor * parallel.pipeline * parallel.context) == 0
    assert {place.expert for place in rank_layout(parallel, smallest)} == set(range(parallel.expert))


def test_interleaved_stages_take_layers_in_turns() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert stage_layers(8, parallel, 0) == (0, 1, 4, 5)
    assert stage_layers(8, parallel, 1) == (2, 3, 6, 7)
    assert stage_layers(8, ParallelConfig(pipeline=2), 1) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("vocab", "tensor", "padded"), [(320, 1, 320), (321, 1, 321), (321, 2, 322), (7, 4, 8)]
)
def test_padded_vocab(vocab: int, tensor: int, padded: int) -> None:
    assert padded_vocab(vocab, tensor) == padded


def test_parameters_of_a_rank_by_hand() -> None:
    shape = HFShape("Qwen3ForCausalLM", 4, 8, 4, 2, 4, 12, 10, 64, tied=False, qk_norm=True)
    layer = (16 + 2 * 8) * 8 + 16 * 8 + 3 * 8 * 12  # q, k and v; output projection; MLP
    assert model_parameters(shape) == 4 * (layer + 2 * 8 + 2 * 4) + 2 * 10 * 8 + 8
    two_by_two = ParallelConfig(tensor=2, pipeline=2)
    sharded = 2 * (layer // 2 + 2 * 8 + 2 * 4)
    assert rank_parameters(shape, two_by_two, 0).total == sharded + 5 * 8
    assert rank_parameters(shape, two_by_two, 1).total == sharded + 5 * 8 + 8


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_add_up_to_the_model(family: Family) -> None:
    """Each parameter is on one tensor rank, except norms and routers, which every one holds."""
    shape, _ = shape_of(family)
    whole = model_parameters(shape)
    parallel = ParallelConfig(tensor=2, pipeline=2)
    summed = 2 * sum(rank_parameters(shape, parallel, stage).total for stage in range(2))
    norms = shape.layers * (2 * shape.hidden + 2 * shape.head_dim * shape.qk_norm) + shape.hidden
    replicated = norms + shape.layers * shape.experts * shape.hidden
    second_embedding = shape.vocab * shape.hidden if shape.tied else 0  # the last stage's copy
    assert summed == whole + replicated + second_embedding


def test_a_tied_output_layer_is_a_copy_on_the_last_of_several_stages() -> None:
    two = ParallelConfig(pipeline=2)
    embedding = QWEN25_05B.vocab * QWEN25_05B.hidden
    total = sum(rank_parameters(QWEN25_05B, two, stage).total for stage in range(2))
    assert total == model_parameters(QWEN25_05B) + embedding


def test_experts_are_spread_and_not_split_over_tensor_ranks() -> None:
    apart = ParallelConfig(tensor=2, sequence=True, expert=2)
    together = ParallelConfig(tensor=2, sequence=True)
    expert = 3 * QWEN3_30B_A3B.hidden * QWEN3_30B_A3B.expert_ffn
    assert rank_parameters(QWEN3_30B_A3B, apart, 0).expert == 48 * 64 * expert
    assert rank_parameters(QWEN3_30B_A3B, together, 0).expert == 48 * 128 * expert // 2


def test_state_bytes() -> None:
    count = rank_parameters(QWEN25_05B, ParallelConfig(), 0)

    def per_parameter(world: int, *, bf16: bool, distributed: bool) -> float:
        parallel = ParallelConfig()
        state = rank_state_bytes(count, parallel, world, bf16=bf16, distributed_optimizer=distributed)
        return state / count.total

    assert per_parameter(1, bf16=True, distributed=False) == 18
    assert per_parameter(4, bf16=True, distributed=False) == 18
    assert per_parameter(4, bf16=True, distributed=True) == pytest.approx(6 + 3)
    assert per_parameter(1, bf16=False, distributed=False) == 16


@pytest.mark.parametrize(
    ("parallel", "plain", "fp8"),
    [
        ({}, 1, 16),
        ({"tensor": 2}, 1, 16),
        ({"tensor": 2, "sequence": True}, 2, 32),
        ({"context": 2}, 4, 32),
        ({"tensor": 4, "sequence": True, "context": 2}, 16, 128),
    ],
)
def test_fp8_gives_every_rank_a_multiple_of_16_tokens(parallel: dict[str, Any], plain: int, fp8: int) -> None:
    layout = ParallelConfig(**parallel)
    assert sequence_alignment(layout, fp8=False) == plain
    assert sequence_alignment(layout, fp8=True) == fp8
    assert fp8 % plain == 0
