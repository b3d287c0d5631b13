"""Runs over context ranks that Transformer Engine has no attention for, refused before a model is built."""

from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.machine.probe import Machine
from gtpo_megatron.plan.layout import HFShape
from gtpo_megatron.plan.precision import precision_problems

SHAPE = HFShape("LlamaForCausalLM", 2, 64, 4, 2, 16, 128, 320, 32_768, tied=False)
FP32 = "model.dtype: fp32 leaves Transformer Engine no attention over context ranks (parallel.context: 2)"
LONG = (
    "training.deterministic: true without flash-attn leaves Transformer Engine, at these lengths, no attention over "
    "context ranks (parallel.context: 2; 1 sequences x 4 heads x 16384 tokens squared)"
)


def config(model: dict[str, Any], tokens: int, deterministic: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "model": {"path": "unused"} | model,
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 384},
            "rollout": {"max_new_tokens": tokens - 384},
            "parallel": {"context": 2},
            "training": {"steps": 1, "deterministic": deterministic, "micro_batch_tokens": 20_000},
        }
    )


@pytest.mark.parametrize(
    ("model", "tokens", "deterministic", "flash_attention", "expected"),
    [
        ({"dtype": "fp32"}, 1024, False, True, FP32),
        ({"dtype": "fp32", "layers": "local"}, 1024, False, True, None),
        ({"dtype": "bf16"}, 1024, True, False, None),
        ({"dtype": "bf16"}, 16_384, True, False, LONG),
        ({"dtype": "bf16"}, 16_384, True, True, None),
        ({"dtype": "bf16"}, 16_384, False, False, None),
    ],
)
def test_no_context_rank_is_left_without_an_attention(
    model: dict[str, Any], tokens: int, deterministic: bool, flash_attention: bool, expected: str | None
) -> None:
    machine = Machine((9, 0), transformer_engine=True, flash_attention=flash_attention)
    found = list(precision_problems(config(model, tokens, deterministic), SHAPE, machine))
    assert [text.startswith(expected or "") for text in found] == ([True] if expected else [])
