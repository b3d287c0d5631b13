"""Whole runs: what they write, and that layouts, interruptions and restarts change nothing of it."""

import gzip
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.run.facts import read_facts
from gtpo_megatron.run.metrics import is_measured
from gtpo_megatron.run.verify_resume import compare
from gtpo_megatron.trajectories.seen import read_seen
from tests.parallel.pool import RankPool
from tests.train.runs import GSM8K, checkpoints, metrics_of, stored
from tests.training_jobs import run_noting_the_store, run_training

STAGES = {"rollout", "store", "training", "weights"}

METRICS = {
    "loss",
    "grad_norm",
    "lr",
    "weight_version",
    "staleness",
    "reward/mean",
    "reward/std",
    "reward/characters",
    "reward/failed",
    "advantage/abs_mean",
    "advantage/min",
    "advantage/max",
    "response/length_mean",
    "response/length_max",
    "response/truncated",
    "response/repetition",
    "response/continued",
    "conflict/prefix_mean",
    "conflict/suffix_mean",
    "conflict/protected_share",
    "conflict/amplified_share",
    "groups/no_signal",
    "gate/pass_rate",
    "entropy/initial",
    "entropy/mean",
    "entropy/p10",
    "entropy/p50",
    "entropy/p90",
    "logprob_gap/mean",
    "logprob_gap/max",
    "tokens",
    "model_flop",
    "world_size",
    "tokens_per_second",
    "speed/tokens_per_second_per_rank",
    "speed/sampling_tokens_per_second",
    "speed/weights_gb_per_second",
    *(f"memory/{part}_gib" for part in ("weights", "gradients", "optimizer", "peak")),
    *(f"seconds/{stage}" for stage in STAGES),
}


@pytest.fixture(scope="module")
def gtpo(ranks: RankPool, make: Callable[..., RunConfig]) -> RunConfig:
    """Four steps of GTPO in one process, left alone."""
    config = make(
        "gtpo",
        data={"path": str(GSM8K), "format": "gsm8k"},
        training={"steps": 4, "profile": {"steps": [2]}},
        checkpoint={"export_hf": True},
        logging={"tensorboard": True, "seen": "entropies"},
        evaluation={"data": {"path": str(GSM8K), "format": "gsm8k", "limit": 3, "system_prompt": ""}},
    )
    ((code, was_stored),) = ranks.run(1, run_noting_the_store, config)
    assert (code, was_stored) == (0, [True] * 4)
    return config


def test_a_run_writes_what_it_did(gtpo: RunConfig) -> None:
    lines = metrics_of(gtpo)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line.keys() >= METRICS
        assert all(math.isfinite(line[name]) for name in METRICS)
        assert line["logprob_gap/max"] < 1e-4  # sampler and trainer hold the same weights
        assert line["staleness"] == 0
    assert len({line["entropy/initial"] for line in training}) == 1
    assert [line["lr"] for line in training] == [5e-3, 1e-2, 1e-2, 1e-2]
    assert [line["weight_version"] for line in training] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 4]
    assert checkpoints(gtpo) == ["step-000004"]
    expected = {"config.yaml", "hf", "tensorboard", "summary.md", "report.png", "logs"}
    assert expected <= {path.name for path in gtpo.path.iterdir()}
    assert (gtpo.path / "hf" / "config.json").is_file()


def test_what_a_run_ran_on_is_kept_and_training_is_traced_where_asked(gtpo: RunConfig) -> None:
    facts = read_facts(gtpo.path)
    assert (facts.world_size, facts.device, facts.gpu) == (1, "cpu", None)
    assert facts.shape == read_shape(gtpo.model.path)
    (trace,) = (gtpo.path / "profile").iterdir()
    assert trace.name == "step-00000002-rank-0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "autograd::engine::evaluate_function: AddBackward0"} <= names  # both passes


def test_stored_trajectories_are_those_of_the_metrics(gtpo: RunConfig) -> None:
    batches = stored(gtpo)
    assert len(batches) == 4
    for batch, line in zip(batches, (m for m in metrics_of(gtpo) if "loss" in m), strict=True):
        assert [(t.group, t.index) for t in batch] == [(g, i) for g in range(2) for i in range(4)]
        assert np.mean([t.reward for t in batch]) == pytest.approx(line["reward/mean"])
        assert np.mean([t.prefix for t in batch]) == line["conflict/prefix_mean"]
        assert all((t.token_versions == line["weight_version"] - 1).all() for t in batch)
        for group in range(2):
            assert sum(t.advantage for t in batch if t.group == group) == pytest.approx(0, abs=1e-9)
    seen = [t.prompt_id for batch in batches for t in batch if t.index == 0]
    assert len(set(seen)) == len(seen) == 8  # the epoch's prompts, each once


def test_what_training_saw_stands_beside_the_batch(gtpo: RunConfig) -> None:
    directory = gtpo.path / "trajectories"
    assert not list(directory.glob(".*"))
    for step, (batch, line) in enumerate(
        zip(stored(gtpo), (m for m in metrics_of(gtpo) if "loss" in m), strict=True)
    ):
        seen = read_seen(directory, step)
        assert seen.entropy.mean() == pytest.approx(line["entropy/mean"], rel=1e-6)
        assert seen.gate.mean() == line["gate/pass_rate"]
        assert seen.gap_max.max() == line["logprob_gap/max"]
        share = 0.0
        for place, t in enumerate(batch):
            gap = np.abs(seen.logprobs[place] - t.logprobs)
            assert gap.mean() == pytest.approx(seen.gap[place], abs=1e-6)
            assert seen.entropies[place].mean() == pytest.approx(seen.entropy[place], rel=2**-8)
            assert (seen.entropies[place].view(np.uint32) & 0xFFFF == 0).all()  # as bfloat16 has them
            position = np.arange(t.length)
            conflict = (position < t.prefix) | (position >= t.length - t.suffix)
            of_conflict = {-1: 0.0, 0: 1.0, 1: 2.0}[int(np.sign(t.advantage))]
            share += seen.coefficient[place] * np.where(conflict, of_conflict, 1.0).sum()
        assert -share == pytest.approx(line["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "world", "sections"),
    [
        ("tp2-pp2", 4, {"parallel": {"tensor": 2, "pipeline": 2}}),
        ("dp2", 2, {"optimizer": {"distributed": True}}),
    ],
)
def test_layouts_train_alike(
    name: str,
    world: int,
    sections: dict[str, Any],
    gtpo: RunConfig,
    ranks: RankPool,
    make: Callable[..., RunConfig],
) -> None:
    config = make(name, data={"path": str(GSM8K), "format": "gsm8k"}, training={"steps": 3}, **sections)
    assert ranks.run(world, run_training, config) == [0] * world
    expected = [line for line in metrics_of(gtpo) if "loss" in line][:3]
    for line, other in zip(metrics_of(config), expected, strict=True):
        for metric in METRICS:
            if is_measured(metric) or metric.startswith("logprob_gap/") or metric == "world_size":
                continue
            assert line[metric] == pytest.approx(other[metric], rel=1e-5, abs=1e-5), metric
    for batch, other in zip(stored(config), stored(gtpo), strict=False):
        assert [t.text for t in batch] == [t.text for t in other]
        assert [t.reward for t in batch] == [t.reward for t in other]


def test_a_run_goes_on_where_it_ended(
    gtpo: RunConfig, ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    sections = {"data": {"path": str(GSM8K), "format": "gsm8k"}}
    halves = [make("resumed", training={"steps": steps}, **sections) for steps in (2, 4)]
    for config in halves:
        assert ranks.run(1, run_training, config) == [0]
    whole = [line for line in metrics_of(gtpo) if "loss" in line]
    report = compare(whole, metrics_of(halves[1]))
    assert report.exact, report.summary()
    assert [[t.token_ids.tolist() for t in batch] for batch in stored(halves[1])] == [
        [t.token_ids.tolist() for t in batch] for batch in stored(gtpo)
    ]
    # a third time there is nothing to do
    assert ranks.run(1, run_training, halves[1]) == [0]
    assert compare(whole, metrics_of(halves[1])).exact


def test_the_directory_of_another_run_is_refused(
    gtpo: RunConfig, ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    before = (gtpo.path / "config.yaml").read_text()
    other = gtpo.model_copy(
        update={
            "algorithm": gtpo.algorithm.model_copy(update={"gamma": 0.5}),
            "optimizer": gtpo.optimizer.model_copy(update={"lr": 1.0}),
        }
    )
    (message,) = ranks.run(1, run_training, other)
    assert str(gtpo.path) in message
    assert "another configuration" in message and "name=" in message
    assert "algorithm.gamma: 0.1 there, 0.5 here" in message
    assert "optimizer.lr: 0.01 there, 1.0 here" in message
    assert (gtpo.path / "config.yaml").read_text() == before
