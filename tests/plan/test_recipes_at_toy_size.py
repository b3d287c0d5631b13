"""The paper's recipes, the very files, trained end to end on a toy model: an overlay swaps model, data, lengths and steps."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gtpo_megatron.config.loading import load_config
from tests.tiny_models import make_tiny_checkpoint

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
STEPS = 2
ROWS = {
    "gsm8k": lambda i: {"question": f"{i}+1?", "answer": f"add one\n#### {i + 1}"},
    "math": lambda i: {"problem": f"{i}+1?", "solution": f"it is \\boxed{{{i + 1}}}"},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay."""
    folder = tmp_path_factory.mktemp("toy")
    make_tiny_checkpoint(folder / "model", "llama")
    for name, row in ROWS.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps(row(i)) + "\n" for i in range(8)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    data = {"path": f"{folder}/${{data.format}}", "name": None, "max_prompt_tokens": 192}
    overlay = {
        "dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "tokenizer": None, "dtype": "fp32"},
        "parallel": {"tensor": 1, "sequence": False},
        "data": data,
        "evaluation": {"data": data | {"limit": 2}},
        "rollout": {"engine": "embedded", "max_new_tokens": 16},
        "training": {"steps": STEPS, "sft_batch_size": 2, "micro_batch_tokens": 512},
        "optimizer": {"warmup_steps": 1},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(overlay))
    return folder / "toy.yaml"


@pytest.mark.parametrize(
    "names",
    [
        ["llama-3.1-8b-bf16"],
        ["qwen2.5-3b-bf16", "reference", "group-12"],
        ["qwen2.5-3b-bf16", "math", "grpo-kl", "usual-adam"],
        ["llama-3.1-8b-bf16", "math", "sft"],
        ["qwen2.5-3b-bf16", "lora", "math", "grpo-kl"],
    ],
    ids="-".join,
)
def test_a_run_of_the_paper_trains_at_toy_size(toy: Path, names: list[str]) -> None:
    files = [*(PAPER / f"{name}.yaml" for name in names), toy]
    overrides = ["model.lora.rank=8"] if "lora" in names else []  # 64 is above the toy's width
    config = load_config(files, overrides)
    command = [sys.executable, "-m", "gtpo_megatron", "train", *map(str, files), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    metrics = [json.loads(line) for line in (config.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert (config.path / "hf" / "config.json").is_file()
