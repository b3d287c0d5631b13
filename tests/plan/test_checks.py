"""Rules that stop a run before a model is built, each shown by the message a user would read: layout, lengths, steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.checks import ARCHITECTURES, Machine, check_run, layout_problems, precision_problems
from gtpo_megatron.plan.layout import HFShape
from tests.plan.checking import CPU, problem
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_run_passes_and_gives_the_shape(
    build: Callable[..., RunConfig], tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    shape = check_run(build(tiny_checkpoint(family), parallel={"pipeline": 2}), 4, CPU)
    assert shape.architecture in ARCHITECTURES
    assert (shape.layers, shape.heads, shape.kv_heads, shape.hidden) == (4, 4, 2, 64)
    assert shape.head_dim == (32 if family.startswith("qwen3") else 16)
    assert shape.tied == (family == "qwen2_tied")
    assert shape.experts == (4 if family == "qwen3_moe" else 0)


@pytest.mark.parametrize(
    ("family", "parallel", "world", "expected"),
    [
        (
            "llama",
            {"tensor": 3},
            3,
            "parallel.tensor: 3 does not divide the 4 attention heads; possible: 1, 2, 4",
        ),
        (
            "llama",
            {"tensor": 4},
            4,
            "parallel.tensor: 4 does not divide the 2 key/value heads; possible: 1, 2",
        ),
        ("llama", {"pipeline": 3}, 3, "parallel.pipeline: 3 does not divide the 4 layers; possible: 1, 2, 4"),
        (
            "llama",
            {"pipeline": 2, "virtual_pipeline": 4},
            2,
            "parallel.virtual_pipeline: 4 does not divide the 2 layers of a pipeline rank; possible: 2",
        ),
        ("llama", {"expert": 2}, 2, "parallel.expert: 2: LlamaForCausalLM has no experts"),
        (
            "qwen3_moe",
            {"expert": 3},
            3,
            "parallel.expert: 3 does not divide the 4 experts; possible: 1, 2, 4",
        ),
        ("qwen3_moe", {"tensor": 2}, 2, "parallel.tensor: 2 with experts needs parallel.sequence: true"),
        ("qwen3_moe", {"expert": 2}, 3, "the world of 3 is not a multiple of expert x pipeline = 2 x 1"),
        (
            "llama",
            {"tensor": 2},
            1,
            "the world has 1 rank, not a multiple of parallel.tensor x pipeline x context = 2 x 1 x 1",
        ),
        ("llama", {"tensor": 2, "pipeline": 2}, 6, "the world has 6 ranks, not a multiple"),
        ("llama", {"context": 2}, 3, "= 1 x 1 x 2 = 2; start 2 ranks (torchrun --nproc-per-node 2) or"),
    ],
)
def test_layout_rules(
    build: Callable[..., RunConfig],
    tiny_checkpoint: Callable[[str], Path],
    family: str,
    parallel: dict[str, int],
    world: int,
    expected: str,
) -> None:
    assert expected in problem(build(tiny_checkpoint(family), parallel=parallel), world)


def test_wide_layers_must_divide_too() -> None:
    odd = HFShape("LlamaForCausalLM", 2, 66, 6, 6, 11, 129, 100, 64, tied=False)
    parallel = RunConfig.model_validate(
        {
            "name": "a",
            "model": {"path": "m"},
            "data": {"path": "d"},
            "training": {"steps": 1},
            "parallel": {"tensor": 6},
        }
    ).parallel
    assert list(layout_problems(parallel, odd, 6)) == [
        "parallel.tensor: 6 does not divide the 129 units of the MLP; possible: 1, 3, 43"
    ]


def test_lengths(build: Callable[..., RunConfig]) -> None:
    message = problem(build(rollout={"max_new_tokens": 200}))
    assert (
        "data.max_prompt_tokens + rollout.max_new_tokens = 128 + 200 = 328: above the model's 256 positions"
        in message
    )
    message = problem(build(training={"micro_batch_tokens": 191}))
    assert "training.micro_batch_tokens: 191 cannot hold the longest sequence" in message
    check_run(build(training={"micro_batch_tokens": 192}), 1, CPU)
    evaluation = {"data": {"path": "gsm8k/x", "max_prompt_tokens": 200}, "max_new_tokens": 57}
    assert "evaluation.data.max_prompt_tokens + new tokens = 200 + 57" in problem(
        build(evaluation=evaluation)
    )


def test_the_micro_batch_holds_the_padding_of_context_and_sequence_parallelism(
    build: Callable[..., RunConfig],
) -> None:
    sections = {
        "training": {"micro_batch_tokens": 188},
        "rollout": {"max_new_tokens": 57},
    }  # 185 tokens at most
    check_run(build(**sections), 1, CPU)
    message = problem(build(**sections, parallel={"context": 2, "tensor": 2, "sequence": True}), 4)
    assert "128 + 57 = 185, padded to 192 for sequence and context parallelism" in message


@pytest.mark.parametrize(
    ("model", "deterministic", "flash_attention", "tokens", "expected"),
    [
        # a row of 16,384 tokens holds one sequence of 4 heads
        ({"dtype": "bf16"}, True, False, 16_384, "training.deterministic: true without flash-attn"),
        ({"dtype": "bf16"}, True, False, 16_383, None),
        ({"dtype": "bf16"}, True, True, 16_384, None),
        ({"dtype": "bf16"}, False, False, 16_384, None),
        ({"dtype": "bf16", "layers": "local"}, True, False, 16_384, None),
        (
            {"dtype": "fp32"},
            False,
            True,
            16_384,
            "model.dtype: fp32 leaves Transformer Engine only an attention",
        ),
        ({"dtype": "fp32", "layers": "local"}, False, True, 16_384, None),
    ],
)
def test_no_row_is_left_to_an_attention_of_quadratic_memory(
    build: Callable[..., RunConfig],
    model: dict[str, str],
    deterministic: bool,
    flash_attention: bool,
    tokens: int,
    expected: str | None,
) -> None:
    shape = HFShape("LlamaForCausalLM", 2, 64, 4, 2, 16, 128, 320, 32_768, tied=False)
    config = build(
        model=model,
        data={"max_prompt_tokens": 384},
        rollout={"max_new_tokens": tokens - 384},
        training={"deterministic": deterministic, "micro_batch_tokens": 20_000},
    )
    machine = Machine((9, 0), transformer_engine=True, flash_attention=flash_attention)
    found = list(precision_problems(config, shape, machine))
    assert [text.startswith(expected or "") for text in found] == ([True] if expected else [])
    if expected:
        assert "1 sequences x 4 heads x 16384 tokens squared, 4 GiB" in found[0]


def test_a_step_must_feed_every_replica(build: Callable[..., RunConfig]) -> None:
    message = problem(build(rollout={"prompts_per_step": 1, "group_size": 2}), 4)
    assert (
        "rollout.prompts_per_step x group_size = 2: fewer sequences in a step than the 4 data-parallel ranks"
        in message
    )
    message = problem(build(algorithm={"name": "sft"}, training={"sft_batch_size": 3}), 4)
    assert "training.sft_batch_size = 3" in message


def test_all_problems_are_named_at_once(build: Callable[..., RunConfig]) -> None:
    config = build(parallel={"tensor": 3}, rollout={"staleness": 1}, training={"micro_batch_tokens": 5})
    message = problem(config, 3)
    assert message.startswith("5 problems with this run:")
    assert all(
        key in message for key in ("parallel.tensor", "rollout.staleness", "training.micro_batch_tokens")
    )


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"steps": [3]}, "training.profile.steps: 3 is no step of this run; they are 1 to training.steps: 2"),
        ({"steps": [0]}, "training.profile.steps: 0 is no step"),
        (
            {"steps": [1], "ranks": [0, 4]},
            "training.profile.ranks: 4 is no rank of this run; they are 0 to 3",
        ),
        ({"steps": [1], "ranks": []}, "training.profile.ranks: empty"),
        ({"ranks": [1]}, "training.profile.ranks: [1] has no effect without training.profile.steps"),
    ],
)
def test_steps_and_ranks_to_trace_that_there_are_not(
    profile: dict[str, Any], said: str, build: Callable[..., RunConfig]
) -> None:
    assert said in problem(build(training={"profile": profile}), 4)
    check_run(build(training={"profile": {"steps": [1, 2], "ranks": [0, 3]}}), 4, CPU)
