"""What must stand on disk before a run: data, a supported checkpoint whose shards are whole, its tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import check_run, read_shape
from tests.plan.checking import CPU, problem
from tests.tiny_models import make_tiny_checkpoint, tiny_tokenizer


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


def test_read_shape_of_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model\.path: nobody/nothing"):
        read_shape("nobody/nothing")
