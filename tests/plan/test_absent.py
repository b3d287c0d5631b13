"""A dry run without weights or tokenizer: what may be absent, what is said of it, and what stays a mistake."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine.probe import Machine
from gtpo_megatron.plan.absent import absent_parts
from gtpo_megatron.plan.checks import check_run

CPU = Machine(cuda_capability=None, transformer_engine=False)


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


def run_of(
    path: Path | str, data: Path | str, tokenizer: Path | str | None = None, **sections: object
) -> RunConfig:
    values = {
        "name": "trial",
        "model": {"path": str(path), "dtype": "fp32", "tokenizer": tokenizer and str(tokenizer)},
        "data": {"path": str(data), "max_prompt_tokens": 128},
        "training": {"steps": 2},
        "rollout": {"max_new_tokens": 64},
        **sections,
    }
    return RunConfig.model_validate(values)


def remove(folder: Path, *keep: str) -> None:
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()


def test_nothing_is_absent_of_a_whole_run(model: Path, tmp_path: Path) -> None:
    assert absent_parts(run_of(model, tmp_path)) == {}


def test_config_json_suffices_for_a_dry_run_and_only_for_it(model: Path) -> None:
    remove(model, "config.json")
    evaluation = {"data": {"path": "x/y", "max_prompt_tokens": 128}, "suites": ["math500"]}
    config = run_of(model, "openai/gsm8k", evaluation=evaluation)
    absent = absent_parts(config)
    assert list(absent) == ["weights", "tokenizer", "data", "evaluation.data", "evaluation.suites"]
    assert f"model.path: {model}: no weights there" in absent["weights"]
    assert "chat template, special tokens and vocabulary were not checked" in absent["tokenizer"]
    assert absent["data"] == "data.path: openai/gsm8k: a hub name; its rows were not looked for"
    assert absent["evaluation.data"].startswith("evaluation.data.path: x/y: ")
    assert absent["evaluation.suites"].startswith("suite math500: path: HuggingFaceH4/MATH-500: a hub name")
    assert check_run(config, 1, CPU, without=absent).layers == 4
    with pytest.raises(UserError, match=r"(?s)no safetensors weights there.*the tokenizer does not load"):
        check_run(config, 1, CPU)


def test_an_index_whose_shards_are_not_fetched_yet_is_absence(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert list(absent_parts(run_of(model, tmp_path))) == ["weights"]
    (model / "model-2.safetensors").touch()
    assert absent_parts(run_of(model, tmp_path)) == {}  # a part of the weights: a broken fetch, not absence


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_is_there_and_damaged_still_stops_a_dry_run(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_text("{}")
    config = run_of(model, tmp_path)
    absent = absent_parts(config)
    assert absent == {}
    with pytest.raises(UserError, match="damaged or cut short|the tokenizer does not load"):
        check_run(config, 1, CPU, without=absent)


def test_old_weights_are_not_absent_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    config = run_of(model, tmp_path)
    with pytest.raises(UserError, match="convert it with save_pretrained"):
        check_run(config, 1, CPU, without=absent_parts(config))


def test_a_hub_name_without_hub_is_said_and_a_wrong_path_refused(model: Path, tmp_path: Path) -> None:
    named = run_of(model, tmp_path, "nobody/nothing")
    assert absent_parts(named)["tokenizer"].startswith(
        "model.tokenizer: nobody/nothing: the hub cannot be reached, and no tokenizer is cached"
    )
    wrong = run_of(model, tmp_path / "no.jsonl", tmp_path / "absent")
    absent = absent_parts(wrong)
    assert absent == {}
    with pytest.raises(UserError) as caught:
        check_run(wrong, 1, CPU, without=absent)
    assert "no such file or folder" in str(caught.value)
    assert f"model.tokenizer: {tmp_path / 'absent'}: the tokenizer does not load" in str(caught.value)


def test_weights_of_a_hub_name_are_said_to_be_unchecked(tmp_path: Path) -> None:
    assert absent_parts(run_of("nobody/nothing", tmp_path))["weights"].endswith(
        "a hub name; its weights were not looked for"
    )
