"""Settings that contradict each other or have no effect: of sampling, servers, evaluation, rewards."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.checks import Machine, check_run, server_problems, settings_problems
from tests.plan.checking import CPU, problem


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
