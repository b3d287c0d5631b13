"""Every rule that stops a run before a model is built, each shown by the message a user would read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine import probe
from gtpo_megatron.plan.checks import (
    ARCHITECTURES,
    Machine,
    check_run,
    layout_problems,
    precision_problems,
    read_shape,
    server_problems,
    settings_problems,
)
from gtpo_megatron.plan.layout import HFShape
from tests.tiny_models import FAMILIES, make_tiny_checkpoint, tiny_tokenizer

CPU = Machine(cuda_capability=None, transformer_engine=False)
HOPPER = Machine(cuda_capability=(9, 0), transformer_engine=True)
AMPERE = Machine(cuda_capability=(8, 0), transformer_engine=True)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n')
    return path


@pytest.fixture
def build(tiny_checkpoint: Callable[[str], Path], rows: Path) -> Callable[..., RunConfig]:
    """A run on a tiny Llama; keyword arguments are sections with the values that differ."""

    def make(model_path: Path | None = None, **sections: dict[str, Any]) -> RunConfig:
        values: dict[str, Any] = {
            "name": "trial",
            "model": {"path": str(model_path or tiny_checkpoint("llama")), "dtype": "fp32"},
            "data": {"path": str(rows), "max_prompt_tokens": 128},
            "training": {"steps": 2},
            "rollout": {"max_new_tokens": 64},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return RunConfig.model_validate(values)

    return make


def problem(config: RunConfig, world_size: int = 1, machine: Machine = CPU) -> str:
    with pytest.raises(UserError) as caught:
        check_run(config, world_size, machine)
    return str(caught.value)


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


def test_suites_in_training(build: Callable[..., RunConfig], rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\npath: {rows}\nmax_prompt_tokens: 200\nmax_new_tokens: 56\n")
    check_run(build(evaluation={"suites": [str(own), "gsm8k"], "every": 5}), 1, CPU)
    own.write_text(f"name: own\npath: {rows}\nmax_prompt_tokens: 200\nmax_new_tokens: 57\n")
    too_long = "suite own: max_prompt_tokens + new tokens = 200 + 57: above the model's 256 positions"
    assert too_long in problem(build(evaluation={"suites": [str(own)]}))
    own.write_text(f"name: own\npath: {tmp_path / 'absent.jsonl'}\n")
    assert "suite own: path: " in problem(build(evaluation={"suites": [str(own)]}))
    assert "evaluation.suites (--suite): gsm9k: no such suite" in problem(
        build(evaluation={"suites": ["gsm9k"]})
    )
    own.write_text(f"name: data\npath: {rows}\n")
    both = {"suites": [str(own)], "data": {"path": str(rows), "max_prompt_tokens": 64}}
    assert "two suites are named data (evaluation.data is one)" in problem(build(evaluation=both))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 5}, "evaluation.every: 5 has no effect without evaluation.data or evaluation.suites"),
        ({"folder": "sets"}, "evaluation.folder: sets has no effect without evaluation.suites"),
        (
            {"endpoint": {"url": "http://host/v1", "model": "m"}},
            "evaluation.endpoint.url: http://host/v1 has no effect in training",
        ),
    ],
)
def test_settings_of_evaluation_without_effect(
    build: Callable[..., RunConfig], evaluation: dict[str, Any], message: str
) -> None:
    assert message in problem(build(evaluation=evaluation))


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
    ("sglang", "problem"),
    [
        ({"servers": 2, "tensor": 2}, None),
        ({"servers": 3, "tensor": 2}, "would take the GPUs 4 to 9, but this process sees 8"),
        ({"servers": 2, "tensor": 4}, "would take the GPUs 4 to 11, but this process sees 8"),
        ({"servers": 2, "tensor": 4, "first_gpu": 0}, None),
        ({"urls": ("http://a:1",)}, None),
    ],
)
def test_servers_started_here_take_gpus_that_no_rank_has(
    build: Callable[..., RunConfig], sglang: dict[str, Any], problem: str | None
) -> None:
    machine = Machine((9, 0), True, gpus=8, local_ranks=4)
    problems = list(server_problems(build(rollout={"engine": "sglang", "sglang": sglang}), machine))
    assert [problem in text for text in problems] == ([True] if problem else [])
    assert not list(server_problems(build(rollout={"engine": "sglang", "sglang": sglang}), CPU))


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


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"rollout": {"sglang": {"servers": 2}}},
            "rollout.sglang.servers: 2 has no effect with rollout.engine: embedded",
        ),
        (
            {"algorithm": {"importance": {"level": "token"}, "old_logprobs": "sampler"}},
            "algorithm.importance.level: token has no effect with algorithm.old_logprobs: sampler",
        ),
        (
            {"algorithm": {"importance": {"level": "sequence"}, "name": "sft"}},
            "algorithm.importance.level: sequence has no meaning with algorithm.name: sft",
        ),
        ({"rollout": {"staleness": 1}}, "rollout.staleness: 1 trains on completions of older weights"),
        ({"rollout": {"staleness": 2}}, "rollout.staleness: 2 needs rollout.engine: sglang"),
        (
            {"rollout": {"engine": "sglang", "oversample": 1.5, "sglang": {"partial": True}}},
            "rollout.sglang.partial: true with rollout.oversample trains on tokens of older weights",
        ),
        ({"rollout": {"oversample": 1.5}}, "rollout.oversample: 1.5 needs rollout.engine: sglang"),
        (
            {"rollout": {"engine": "sglang", "batch_size": 8}},
            "rollout.batch_size: 8 belongs to rollout.engine: embedded",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"urls": ["http://a"], "urls_file": "b"}}},
            "rollout.sglang.urls and rollout.sglang.urls_file: give one",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"urls": ["http://a"], "servers": 2}}},
            "rollout.sglang.servers: 2: servers are given by URL",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"host": "0.0.0.0"}}},
            "rollout.sglang.host: 0.0.0.0 is reachable from other machines",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"partial": True}}},
            "rollout.sglang.partial: true continues",
        ),
        (
            {"algorithm": {"name": "sft"}, "rollout": {"engine": "sglang", "staleness": 1}},
            "which samples nothing",
        ),
        ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, "optimizer.min_lr: 1e-05 is above optimizer.lr: 1e-06"),
        ({"optimizer": {"warmup_steps": 5}}, "optimizer.warmup_steps: 5 is above training.steps: 2"),
        ({"optimizer": {"offload": True}}, "optimizer.offload: true needs optimizer.distributed: true"),
        (
            {"optimizer": {"offload": True, "distributed": True}},
            "optimizer.offload: true needs model.dtype: bf16, not fp32",
        ),
        (
            {
                "optimizer": {"offload": True, "distributed": True},
                "model": {"dtype": "bf16", "fp8": {"format": "hybrid", "param": True}},
            },
            "optimizer.offload: true does not go with model.fp8.param: true",
        ),
        (
            {
                "optimizer": {"offload": True, "distributed": True},
                "model": {"dtype": "bf16", "lora": {"rank": 4}},
            },
            "optimizer.offload: true with model.lora",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    build: Callable[..., RunConfig], sections: dict[str, Any], expected: str
) -> None:
    assert expected in problem(build(**sections))


def test_sglang_settings_that_fit_together(build: Callable[..., RunConfig]) -> None:
    sglang = {"urls": ["http://a:1"], "partial": True, "host": "0.0.0.0", "api_key": "env:KEY"}
    assert (
        list(
            settings_problems(
                build(
                    rollout={"engine": "sglang", "staleness": 1, "sglang": sglang},
                    algorithm={"importance": {"level": "token"}},
                )
            )
        )
        == []
    )


def test_a_step_must_feed_every_replica(build: Callable[..., RunConfig]) -> None:
    message = problem(build(rollout={"prompts_per_step": 1, "group_size": 2}), 4)
    assert (
        "rollout.prompts_per_step x group_size = 2: fewer sequences in a step than the 4 data-parallel ranks"
        in message
    )
    message = problem(build(algorithm={"name": "sft"}, training={"sft_batch_size": 3}), 4)
    assert "training.sft_batch_size = 3" in message


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("no_such_module_here:f", "no_such_module_here does not import: ModuleNotFoundError"),
        ("math:no_such_function", "math has no no_such_function"),
        ("math:pi", "pi is not callable"),
        ("math.sqrt", "expected package.module:function"),
        ("tests.fixtures_that_raise:f", "does not import"),
    ],
)
def test_reward_functions_that_do_not_import(
    build: Callable[..., RunConfig], function: str, expected: str
) -> None:
    message = problem(
        build(rewards={"terms": [{"kind": "format"}, {"kind": "python", "function": function}]})
    )
    assert message.startswith(f"rewards.terms[1].function: {function}: ") and expected in message


def test_reward_terms_need_names_of_their_own(build: Callable[..., RunConfig]) -> None:
    twice = [{"kind": "python", "function": f"tests.rewards.user_terms:{f}"} for f in ("moody", "half")]
    assert "rewards.terms: two terms are called python" in problem(build(rewards={"terms": twice}))
    check_run(build(rewards={"terms": [t | {"name": str(i)} for i, t in enumerate(twice)]}), 1, CPU)
    assert "rewards.terms: the list is empty" in problem(build(rewards={"terms": []}))


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (
            {"kind": "paper_correctness", "options": {"scal": 1}},
            "paper_correctness: .*'scal' .*tolerance, sub",
        ),
        ({"kind": "format", "options": {"tolerance": 1}}, "format: .*'tolerance' .*options: none"),
        (
            {"kind": "paper_correctness", "options": {"tolerance": "much"}},
            "'tolerance' must be a number from 0",
        ),
        ({"kind": "paper_correctness", "options": {"tolerance": -1}}, "'tolerance' must be a number from 0"),
        ({"kind": "paper_correctness", "options": {"substring": 1}}, "'substring' must be true or false"),
        (
            {"kind": "math_verify", "options": {"rule": "last"}},
            "'rule' must be one of one_answer, last_number",
        ),
        (
            {"kind": "python", "function": "tests.rewards.user_terms:half", "options": {"ofset": 1}},
            "user_terms:half: .*'ofset' .*options: offset",
        ),
        (
            {"kind": "python", "function": "tests.rewards.user_terms:half", "options": {"question": "q"}},
            "'question' is given by every call",
        ),
        ({"kind": "python", "function": "math:sqrt"}, "math:sqrt: "),
    ],
)
def test_options_that_a_term_does_not_take(
    build: Callable[..., RunConfig], term: dict, expected: str
) -> None:
    message = problem(build(rewards={"terms": [{"kind": "paper_format"}, term]}))
    assert re.match(rf"rewards.terms\[1\].options: .*{expected}", message), message


@pytest.mark.parametrize(
    "term",
    [
        {"kind": "python", "function": "tests.rewards.user_terms:half", "options": {"offset": 2}},
        {"kind": "python", "function": "tests.rewards.user_terms:Judge.score"},
        {"kind": "paper_correctness", "options": {"tolerance": 0, "substring": True, "rule": "last_number"}},
        {"kind": "math_verify", "options": {"rule": "one_answer"}},
    ],
)
def test_functions_and_options_that_terms_take(build: Callable[..., RunConfig], term: dict) -> None:
    check_run(build(rewards={"terms": [term]}), 1, CPU)


def test_data_paths(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    assert "data.path: " in problem(build(data={"path": str(tmp_path / "absent.jsonl")}))
    message = problem(build(evaluation={"data": {"path": "./absent.parquet", "max_prompt_tokens": 64}}))
    assert message.startswith("evaluation.data.path: ./absent.parquet: no such file")


def test_model_path_that_is_no_checkpoint(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    assert f"model.path: {tmp_path}: no config.json there" in problem(build(tmp_path))
    assert f"model.path: {tmp_path / 'absent'}: no such folder" in problem(build(tmp_path / "absent"))


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unsupported_architectures_and_variants(
    build: Callable[..., RunConfig], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "model")
    edit_json(path / "config.json", architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM" in problem(build(path))
    edit_json(path / "config.json", architectures=["LlamaForCausalLM"], attention_bias=True)
    assert "config.json has attention_bias: true" in problem(build(path))
    (path / "config.json").write_text("{broken")
    assert f"model.path: {path}" in problem(build(path))


def test_missing_shards(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "sharded", "llama", max_shard_size="200KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    check_run(build(path), 1, CPU)
    shards[1].unlink()
    message = problem(build(path))
    assert (
        f"1 of {len(shards)} weight files named in model.safetensors.index.json are missing: {shards[1].name}"
        in message
    )


def test_a_shard_cut_short_or_swapped(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "sharded", "llama", max_shard_size="200KB")
    first, second, *_ = sorted(path.glob("model-*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    assert f"{first}: damaged or cut short" in problem(build(path))
    shutil.copy(second, first)
    assert f"{first}: lacks" in problem(build(path))
    first.write_bytes(whole)
    (path / "model.safetensors.index.json").write_text("{}")
    assert "not a safetensors index" in problem(build(path))


def test_no_weights_at_all(
    build: Callable[..., RunConfig], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "model")
    (path / "model.safetensors").unlink()
    assert "no safetensors weights there" in problem(build(path))
    (path / "pytorch_model.bin").touch()
    assert "convert it with save_pretrained" in problem(build(path))


def test_tokenizers(build: Callable[..., RunConfig], tmp_path: Path) -> None:
    def with_tokenizer(**changes: Any) -> RunConfig:
        tokenizer = tiny_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        folder = tmp_path / "-".join(changes)
        tokenizer.save_pretrained(folder)
        return build(model={"tokenizer": str(folder)})

    assert "no chat template" in problem(with_tokenizer(chat_template=None))
    assert "no pad token" in problem(with_tokenizer(pad_token=None))
    assert "no EOS token" in problem(with_tokenizer(eos_token=None))


def test_a_tokenizer_without_template_may_render_plain_text(
    build: Callable[..., RunConfig], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    check_run(build(model={"tokenizer": str(tmp_path / "plain")}, data={"chat": False}), 1, CPU)


def test_a_tokenizer_that_is_absent_damaged_or_of_another_model(
    build: Callable[..., RunConfig], tmp_path: Path
) -> None:
    assert "model.tokenizer: " in problem(build(model={"tokenizer": str(tmp_path / "absent")}))
    folder = tmp_path / "damaged"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer does not load" in problem(build(model={"tokenizer": str(folder)}))
    small = make_tiny_checkpoint(tmp_path / "small", "llama", vocab_size=128)
    tiny_tokenizer(320).save_pretrained(small)
    assert "the tokenizer has 320 tokens, the model only 128" in problem(build(small))


def test_all_problems_are_named_at_once(build: Callable[..., RunConfig]) -> None:
    config = build(parallel={"tensor": 3}, rollout={"staleness": 1}, training={"micro_batch_tokens": 5})
    message = problem(config, 3)
    assert message.startswith("5 problems with this run:")
    assert all(
        key in message for key in ("parallel.tensor", "rollout.staleness", "training.micro_batch_tokens")
    )


def test_read_shape_of_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model\.path: nobody/nothing"):
        read_shape("nobody/nothing")


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
