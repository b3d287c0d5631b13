"""Runs that end by what goes wrong in them, and what they leave; faults that end none."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.run.directory import Owner, read_status
from gtpo_megatron.trajectories.seen import read_seen
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.pool import RankPool
from tests.train.runs import checkpoints, metrics_of, stored
from tests.training_jobs import reward, run_destroying_weights, run_training


def test_a_record_that_cannot_be_written_ends_no_run(ranks: RankPool, make: Callable[..., RunConfig]) -> None:
    config = make("no-record", training={"steps": 2})
    blocked = config.path / "trajectories" / "seen-00000000.parquet"
    blocked.mkdir(parents=True)
    (blocked / "file").touch()
    assert ranks.run(1, run_training, config) == [0]
    assert blocked.is_dir() and read_seen(blocked.parent, 1) is not None
    assert "step 1: what training saw" in (config.path / "logs" / "rank-0.log").read_text()


def test_an_alarm_stops_a_run_that_goes_on_if_it_is_told_to(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    def configure(action: str) -> RunConfig:
        alarm = {"action": action, "baseline": 1, "patience": 2, "entropy_rise": 1e-6}
        return make("alarmed", training={"steps": 6}, parallel={"pipeline": 2}, alarm=alarm)

    config = configure("stop")
    codes = ranks.run(2, run_training, config)
    assert all("step 5: stopped by the alarm (entropy" in code for code in codes)
    assert [line["alarm/rules"].split(", ")[:1] for line in metrics_of(config)] == [[""]] * 3 + [
        ["entropy"]
    ] * 2
    assert checkpoints(config) == ["step-000005"]
    assert "step 4: alarm entropy: entropy" in (config.path / "logs" / "rank-0.log").read_text()
    assert ranks.run(2, run_training, configure("warn")) == [0, 0]
    assert [line["alarm/firing"] > 0 for line in metrics_of(config)] == [False] * 3 + [True] * 3
    assert "| entropy | 4 | 6 | 3 |" in (config.path / "summary.md").read_text()


def test_gradients_that_are_not_finite_are_skipped_counted_and_end_the_run(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    config = make(
        "bad-steps",
        training={"steps": 5, "max_bad_steps": 2},
        rewards={"terms": [reward("beyond_single_precision")]},
    )
    (message,) = ranks.run(1, run_training, config)
    assert checkpoints(config) == ["step-000002"]  # saved before giving up
    assert "2 steps in a row" in message and "training.max_bad_steps: 2" in message
    assert [(line["update/applied"], line["weight_version"]) for line in metrics_of(config)] == [
        (False, 0),
        (False, 0),
    ]
    notes = sorted((config.path / "bad_steps").iterdir())
    assert [path.name for path in notes] == ["step-00000001.json", "step-00000002.json"]
    for step, path in enumerate(notes, start=1):
        note = json.loads(path.read_text())
        assert note["step"] == step
        assert Path(note["batch"]) == TrajectoryStore(config.path / "trajectories").path(step - 1)
        assert Path(note["batch"]).is_file()


def test_a_verifier_that_fails_ends_the_run_after_saving(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    broken = make("failing-rewards", rewards={"terms": [reward("failing")], "max_failed_share": 0.5})
    (message,) = ranks.run(1, run_training, broken)
    assert "8 of 8 completions could not be scored" in message and "no verdict" in message
    assert checkpoints(broken) == ["step-000000"]
    assert stored(broken) == []
    tolerant = make("failing-tolerated", rewards={"terms": [reward("failing")], "max_failed_share": 1.0})
    assert ranks.run(1, run_training, tolerant) == [0]
    assert [line["reward/failed"] for line in metrics_of(tolerant)] == [1.0] * 3
    assert all("no verdict" in t.reward_error for batch in stored(tolerant) for t in batch)


def supervised(make: Callable[..., RunConfig], name: str, **training: Any) -> RunConfig:
    return make(
        name,
        algorithm={"name": "sft"},
        training={"steps": 3, **training},
        checkpoint={"every": 1, "export_hf": True},
    )


@pytest.mark.parametrize(("step", "saved"), [(3, "step-000002"), (2, "step-000001")])
def test_weights_that_are_not_finite_never_become_a_result(
    ranks: RankPool, make: Callable[..., RunConfig], step: int, saved: str
) -> None:
    config = supervised(make, f"destroyed-{step}")
    (message,) = ranks.run(1, run_destroying_weights, config, step)
    assert "not finite" in message and "optimizer.lr" in message and "embedding" in message
    assert checkpoints(config)[-1] == saved
    assert (config.path / "checkpoints" / "latest").readlink() == Path(saved)
    assert not (config.path / "hf").exists()
    assert ranks.run(1, run_training, config) == [0]  # from what is whole
    assert (config.path / "hf" / "config.json").is_file()


def test_a_batch_that_cannot_be_packed_ends_the_run_after_saving(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    config = make("packing", training={"micro_batch_tokens": 8}, checkpoint={"every": 0})
    (message,) = ranks.run(1, run_training, config)
    assert "training.micro_batch_tokens: 8" in message
    assert checkpoints(config) == ["step-000000"]
    assert len(stored(config)) == 1  # what was sampled is kept


def test_a_run_has_one_owner_and_says_how_it_ended(ranks: RankPool, make: Callable[..., RunConfig]) -> None:
    config = make("owned", training={"steps": 2})
    owner = Owner(config.path, steps=2)
    (message,) = ranks.run(1, run_training, config)
    assert f"process {os.getpid()}" in message and "going on already" in message
    assert not (config.path / "config.yaml").exists()
    owner.end(None, 0)
    assert ranks.run(1, run_training, config) == [0]
    status = read_status(config.path)
    assert (status.state, status.step, status.steps, status.checkpoint_step) == ("complete", 2, 2, 2)
    assert (status.exit_code, status.message) == (0, "")
    other = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"min_lr": 1e-6, "lr": 1.0})}
    )
    (message,) = ranks.run(1, run_training, other)
    assert "optimizer.min_lr" in message
    assert read_status(config.path) == status  # another run's refusal is not this run's end
    longer = make(
        "owned", training={"steps": 3}, rewards={"terms": [reward("different_characters")], "workers": 1}
    )
    assert ranks.run(1, run_training, longer) == [0]
    assert (load_config(config.path / "config-1.yaml"), load_config(config.path / "config.yaml")) == (
        config,
        longer,
    )
    assert not (config.path / "lease.json").exists()
    broken = make("owned-failed", rewards={"terms": [reward("failing")], "max_failed_share": 0.5})
    (message,) = ranks.run(1, run_training, broken)
    status = read_status(broken.path)
    assert (status.state, status.exit_code, status.message) == ("failed", 2, message)
    assert not (broken.path / "lease.json").exists()
