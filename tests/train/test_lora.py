"""Whole runs that train LoRA adapters: the base as the KL term's reference, sampling with merged weights, going on, and the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import LoraConfig, RunConfig
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.run.verify_resume import compare
from tests.parallel.pool import RankPool
from tests.training_jobs import run_counting_policies, run_training, small_run

LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[..., RunConfig]:
    """Configurations of runs of GRPO with a KL term and adapters, in one directory."""
    directory = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (directory / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = tiny_checkpoint("llama")

    def configure(name: str, steps: int, **sections: Any) -> RunConfig:
        run = small_run(
            directory,
            name,
            model,
            directory / "sums.jsonl",
            algorithm={"name": "grpo", "kl_beta": 0.1},
            training={"steps": steps},
            **sections,
        )
        return run.model_copy(update={"model": run.model.model_copy(update={"lora": LORA})})

    return configure


@pytest.fixture(scope="module")
def run(ranks: RankPool, make: Callable[..., RunConfig]) -> RunConfig:
    """Four steps in one process, left alone."""
    config = make("whole", 4, checkpoint={"export_hf": True})
    assert ranks.run(1, run_counting_policies, config) == [(0, 1)]  # no second policy for the KL term
    return config


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    return read_metrics(config.path / "metrics.jsonl")


def test_the_reference_of_the_kl_term_is_the_base(run: RunConfig) -> None:
    first, *later = [line["kl/mean"] for line in metrics(run)]
    assert first == 0  # new adapters compute the base, bit for bit
    assert all(value > 0 for value in later)


def test_the_engine_samples_with_merged_weights(run: RunConfig) -> None:
    assert [line["weight_version"] for line in metrics(run)] == [1, 2, 3, 4]
    assert all(line["logprob_gap/max"] < 1e-4 for line in metrics(run))


def test_it_leaves_a_merged_model_and_the_adapters(run: RunConfig) -> None:
    assert (run.path / "hf" / "model.safetensors").is_file()
    assert {path.name for path in (run.path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_it_goes_on_where_it_ended(run: RunConfig, ranks: RankPool, make: Callable[..., RunConfig]) -> None:
    for steps in (2, 4):
        assert ranks.run(1, run_training, make("resumed", steps)) == [0]
    report = compare(metrics(run), metrics(make("resumed", 4)))
    assert report.exact, report.summary()


def test_full_training_does_not_go_on_from_adapters(
    run: RunConfig, ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    full = run.model_copy(update={"model": run.model.model_copy(update={"lora": None})})
    (message,) = ranks.run(1, run_training, full)
    assert "model.lora: " in message and "here" in message
