"""Rules of types and Transformer Engine: what a machine can compute with, and what FP8 wants."""

from collections.abc import Callable
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.machine import probe
from gtpo_megatron.plan.checks import Machine, check_run, precision_problems, settings_problems
from gtpo_megatron.plan.layout import HFShape
from tests.plan.checking import AMPERE, CPU, HOPPER, problem


@pytest.mark.parametrize(
    ("model", "machine", "expected"),
    [
        (
            {"fp8": "hybrid", "dtype": "bf16"},
            CPU,
            "model.fp8.format: hybrid needs Transformer Engine, which is not installed",
        ),
        ({"fp8": "hybrid", "dtype": "bf16"}, CPU, "model.fp8.format: hybrid needs a CUDA GPU"),
        (
            {"fp8": "e4m3", "dtype": "bf16"},
            AMPERE,
            "model.fp8.recipe: tensorwise needs compute capability 8.9 or higher; here it is 8.0",
        ),
        (
            {"fp8": "hybrid", "dtype": "fp32"},
            HOPPER,
            "model.fp8.format: hybrid needs model.dtype: bf16, not fp32",
        ),
        ({"fp8": "hybrid", "dtype": "bf16", "layers": "local"}, HOPPER, "not model.layers: local"),
        ({"layers": "transformer_engine"}, CPU, "model.layers: transformer_engine needs Transformer Engine"),
    ],
)
def test_precision_rules(
    build: Callable[..., RunConfig], model: dict[str, str], machine: Machine, expected: str
) -> None:
    assert expected in problem(build(model=model), machine=machine)


@pytest.mark.parametrize("layers", ["auto", "local"])
def test_an_incomplete_transformer_engine_is_refused_whatever_layers_are_asked_for(
    build: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    monkeypatch.setattr(probe, "transformer_engine_parts", lambda: (True, True, False))
    message = problem(build(model={"layers": layers}), machine=probe.this_machine())
    assert "without its PyTorch extension (transformer-engine-torch)" in message
    assert "pip install --no-build-isolation -r requirements/cluster.txt" in message


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "expected"),
    [
        ("tensorwise", (8, 9), (12, 1), None),
        ("tensorwise", (8, 9), (12, 0), "a torch built for CUDA 12.1 or higher; here it is 12.0"),
        ("blockwise", (9, 0), (12, 9), None),
        ("blockwise", (9, 0), (12, 8), "a torch built for CUDA 12.9 or higher; here it is 12.8"),
        ("blockwise", (8, 9), (13, 0), "compute capability 9.0 or higher; here it is 8.9"),
        ("delayed", (9, 0), (12, 8), None),
    ],
)
def test_what_an_fp8_recipe_needs(
    build: Callable[..., RunConfig],
    recipe: str,
    capability: tuple[int, int],
    cuda: tuple[int, int],
    expected: str | None,
) -> None:
    config = build(model={"fp8": {"format": "hybrid", "recipe": recipe}, "dtype": "bf16"})
    machine = Machine(capability, transformer_engine=True, cuda_version=cuda)
    if expected is None:
        check_run(config, 1, machine)
    else:
        assert f"model.fp8.recipe: {recipe} needs {expected}" in problem(config, machine=machine)


@pytest.mark.parametrize(
    ("fp8", "algorithm", "named"),
    [
        ({"format": "none", "recipe": "blockwise"}, {}, "model.fp8.recipe: blockwise has no effect"),
        ({"format": "none", "param": True}, {}, "model.fp8.param: True has no effect"),
        ({"recipe": "delayed", "first_last_bf16": True}, {}, "model.fp8.first_last_bf16: true does not go"),
        ({"recipe": "delayed"}, {"name": "grpo", "kl_beta": 0.1}, "algorithm.kl_beta compares"),
        ({"recipe": "delayed"}, {"importance": {"level": "token"}}, "algorithm.importance.level compares"),
        ({"recipe": "delayed"}, {"updates_per_batch": 2}, "algorithm.updates_per_batch compares"),
        ({"recipe": "delayed"}, {"updates_per_batch": 2, "old_logprobs": "sampler"}, None),
        ({"recipe": "delayed"}, {}, None),
        ({"first_last_bf16": True}, {"updates_per_batch": 2, "importance": {"level": "token"}}, None),
    ],
)
def test_fp8_settings_that_contradict_each_other(
    build: Callable[..., RunConfig], fp8: dict[str, Any], algorithm: dict[str, Any], named: str | None
) -> None:
    config = build(model={"fp8": {"format": "hybrid"} | fp8, "dtype": "bf16"}, algorithm=algorithm)
    problems = [text for text in settings_problems(config) if "fp8" in text]
    assert [text.startswith(named or "") for text in problems] == ([True] if named else [])


def test_fp8_with_adapters_is_refused(build: Callable[..., RunConfig]) -> None:
    config = build(model={"fp8": "hybrid", "dtype": "bf16", "lora": {}})
    problems = [text for text in settings_problems(config) if "fp8" in text]
    assert problems == [
        "model.fp8.format: hybrid with model.lora is not supported; set model.fp8=none or model.lora=null"
    ]


def test_the_micro_batch_holds_the_padding_of_fp8(build: Callable[..., RunConfig]) -> None:
    sections = {
        "training": {"micro_batch_tokens": 190},
        "rollout": {"max_new_tokens": 57},
        "model": {"fp8": "hybrid", "dtype": "bf16"},
    }
    assert "128 + 57 = 185, padded to 192 for FP8 and the layout" in problem(build(**sections), 1, HOPPER)
    check_run(build(**sections | {"training": {"micro_batch_tokens": 192}}), 1, HOPPER)


@pytest.mark.parametrize(
    ("hidden", "head", "ffn", "expected"),
    [
        (64, 16, 136, "MLP width per rank is 136"),
        (72, 16, 128, "hidden size is 72"),
        (64, 18, 128, "attention width per rank is 72"),
    ],
)
def test_fp8_wants_multiples_of_16(
    build: Callable[..., RunConfig], hidden: int, head: int, ffn: int, expected: str
) -> None:
    shape = HFShape("LlamaForCausalLM", 2, hidden, 4, 2, head, ffn, 320, 256, tied=False)
    config = build(model={"fp8": "hybrid", "dtype": "bf16"})
    assert list(precision_problems(config, shape, HOPPER)) == [
        f"model.fp8.format: hybrid needs matrix sizes that are multiples of 16; {expected}"
    ]
