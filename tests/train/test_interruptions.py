"""Runs that are cut short: by signals, in sampling, in an evaluation; what the next process makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.run.verify_resume import compare
from tests.parallel.pool import RankPool
from tests.train.runs import GSM8K, checkpoints, metrics_of, stored
from tests.training_jobs import (
    run_stopped_in_sampling,
    run_training,
    run_with_signal,
    run_without_a_last_evaluation,
)


def evaluations_of(config: RunConfig) -> list[tuple[int, str]]:
    """(step, suite) of every evaluation in the metrics, in order."""
    names = {"eval/accuracy": "data", "eval/short/accuracy": "short"}
    return [(line["step"], names[name]) for line in metrics_of(config) for name in names if name in line]


def test_an_evaluation_that_could_not_be_made_is_made_by_the_next_process(
    ranks: RankPool, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    evaluation = {"data": {"path": str(GSM8K), "format": "gsm8k", "limit": 3, "system_prompt": ""}}
    suite = tmp_path / "short.yaml"
    suite.write_text(f"name: short\npath: {GSM8K}\nformat: gsm8k\nlimit: 2\nsamples: 4\nmax_new_tokens: 5\n")
    evaluation["suites"] = [str(suite)]
    config = make("evaluated-late", training={"steps": 2}, evaluation=evaluation)
    # evaluation.data has its figures by then, and the suite has none
    assert ranks.run(1, run_without_a_last_evaluation, config) == ["no server left"]
    assert checkpoints(config) == ["step-000002"]
    assert evaluations_of(config) == [(0, "data"), (0, "short"), (2, "data")]
    for _ in range(2):  # and not again
        assert ranks.run(1, run_training, config) == [0]
        assert evaluations_of(config) == [(0, "data"), (0, "short"), (2, "data"), (2, "short")]
    last = metrics_of(config)[-1]
    assert last["eval/short/prompts"] == 2 and last["eval/short/length_mean"] <= 5
    assert {"eval/short/pass@4", "eval/short/maj@4"} <= last.keys()
    assert "| short | " in (config.path / "summary.md").read_text()


STALE: dict[str, Any] = {
    "training": {"steps": 5},
    "rollout": {"staleness": 1},
    "algorithm": {"importance": {"level": "token"}},
}


@pytest.fixture(scope="module")
def stale(ranks: RankPool, make: Callable[..., RunConfig]) -> RunConfig:
    config = make("stale", **STALE)
    assert ranks.run(1, run_training, config) == [0]
    return config


def test_batches_sampled_ahead_are_one_update_old(stale: RunConfig) -> None:
    lines = metrics_of(stale)
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1, 1]
    assert lines[0]["logprob_gap/max"] < 1e-4 < lines[2]["logprob_gap/max"]
    assert all(0 <= line["importance/truncated_share"] <= 1 for line in lines)
    versions = [{int(v) for t in batch for v in t.token_versions} for batch in stored(stale)]
    assert versions == [{0}, {0}, {1}, {2}, {3}]


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_sigterm_ends_a_run_that_the_same_command_goes_on_with(
    world: int, rank: int, stale: RunConfig, ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    sections = STALE | ({"parallel": {"pipeline": 2}} if world == 2 else {})
    config = make(f"stopped-{world}", **sections)
    assert ranks.run(world, run_with_signal, config, rank) == [(3, True)] * world
    done = len(metrics_of(config))
    assert 1 <= done < 5
    assert checkpoints(config) == [f"step-{done:06d}"]
    before = [[t.text for t in batch] for batch in stored(config)]
    assert len(before) in (done, done + 1)  # the batch that was being sampled ahead is kept if it was whole
    assert ranks.run(world, run_training, config) == [0] * world
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4, 5]
    assert before == [[t.text for t in batch] for batch in stored(stale)[: len(before)]]
    for batch, other in zip(stored(config), stored(stale), strict=True):
        assert [t.prompt_id for t in batch] == [t.prompt_id for t in other]
    assert stored(config)[done][0].token_versions.max() in (done - 1, done)


# the engine's calls: evaluation, two batches, evaluation
@pytest.mark.parametrize(("world", "rank", "call", "done"), [(1, 0, 1, 0), (2, 1, 3, 1), (1, 0, 4, 2)])
def test_sampling_that_a_signal_cuts_short_is_done_again_by_the_next_process(
    world: int, rank: int, call: int, done: int, ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    evaluation = {"data": {"path": str(GSM8K), "format": "gsm8k", "limit": 4, "system_prompt": ""}}
    sections = {"training": {"steps": 2}, "evaluation": evaluation}
    sections |= {"parallel": {"pipeline": 2}} if world == 2 else {}
    config, whole = (make(f"{name}-{call}", **sections) for name in ("cut-short", "left-alone"))
    assert ranks.run(world, run_stopped_in_sampling, config, rank, call) == [3] * world
    assert checkpoints(config) == [f"step-{done:06d}"]
    assert len(stored(config)) == done  # nothing of the batch that was cut short
    assert [line["step"] for line in metrics_of(config) if "loss" in line] == [1, 2][:done]
    assert json.loads((config.path / "status.json").read_text())["exit_code"] == 3
    assert ranks.run(world, run_training, config) == [0] * world
    assert ranks.run(world, run_training, whole) == [0] * world
    report = compare(metrics_of(config), metrics_of(whole))
    assert report.exact and report.compared > 60, report.summary()
