"""Conversions that cannot work are refused before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.conversion import check_output, check_source


def hf_directory(path: Path, architecture: str | None = "LlamaForCausalLM") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": architecture and [architecture]}))
    return path


def megatron_directory(path: Path) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    hf_directory(path / "hf")
    return path


def test_sources_of_the_right_kind_are_accepted(tmp_path: Path) -> None:
    hf, megatron = hf_directory(tmp_path / "hf"), megatron_directory(tmp_path / "megatron")
    check_source(hf, "hf")
    check_source(megatron, "megatron")
    check_source(hf)
    check_source(megatron)
    check_output(tmp_path / "new")


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    hf, megatron = hf_directory(tmp_path / "hf"), megatron_directory(tmp_path / "megatron")
    (tmp_path / "empty").mkdir()
    broken = hf_directory(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    for source, kind, message in (
        (tmp_path / "missing", "hf", "missing: no such directory"),
        (tmp_path / "empty", None, "empty: neither a Megatron checkpoint"),
        (hf, "megatron", "is a Hugging Face directory .*; this command reads a Megatron checkpoint"),
        (megatron, "hf", "is a Megatron checkpoint .*; this command reads a Hugging Face directory"),
        (
            hf_directory(tmp_path / "gpt2", "GPT2LMHeadModel"),
            "hf",
            "GPT2LMHeadModel is not supported; supported: Llama",
        ),
        (hf_directory(tmp_path / "bare", None), "hf", "architecture none is not supported"),
        (broken, "hf", "config.json: not a model's configuration"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(source, kind)
    with pytest.raises(UserError, match="hf: exists already"):
        check_output(hf)


def test_the_command_refuses_without_importing_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from gtpo_megatron.commands.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)"
    )
    source = hf_directory(tmp_path / "gemma", "Gemma2ForCausalLM")
    arguments = ["convert", "hf-to-megatron", str(source), str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Gemma2ForCausalLM is not supported" in result.stderr
    assert result.stdout.strip() == "False"
