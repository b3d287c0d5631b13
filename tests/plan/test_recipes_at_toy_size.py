"""The paper's recipes, the very files, trained end to end on a toy model in one process. On nodes: tests/slurm/test_paper_recipes.py."""

import json
import math
from pathlib import Path

import pytest

from gtpo_megatron.config.loading import load_config
from tests.paper_recipes import STEPS, paper_files, write_toy_overlay
from tests.parallel.pool import RankPool
from tests.training_jobs import run_checked


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay."""
    one_process = {"tensor": 1, "sequence": False}
    return write_toy_overlay(
        tmp_path_factory.mktemp("toy"), parallel=one_process, rollout={"engine": "embedded"}
    )


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
def test_a_run_of_the_paper_trains_at_toy_size(ranks: RankPool, toy: Path, names: list[str]) -> None:
    files = [*paper_files(*names), toy]
    overrides = ["model.lora.rank=8"] if "lora" in names else []  # 64 is above the toy's width
    config = load_config(files, overrides)
    assert ranks.run(1, run_checked, config) == [0]
    metrics = [json.loads(line) for line in (config.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert (config.path / "hf" / "config.json").is_file()
