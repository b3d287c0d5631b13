"""Whole runs: what they write, that layouts and interruptions change nothing, and how they end."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.run.directory import Owner, read_status
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.run.verify_resume import compare
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.seen import read_seen
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.pool import RankPool
from tests.training_jobs import (
    reward,
    run_destroying_weights,
    run_noting_the_store,
    run_stopped_in_sampling,
    run_training,
    run_with_signal,
    run_without_a_last_evaluation,
    small_run,
)

GSM8K = Path(__file__).parent / "fixtures" / "gsm8k_small.jsonl"
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
    "tokens_per_second",
    "memory/peak_gib",
    *(f"seconds/{stage}" for stage in STAGES),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make(directory: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """Configurations of runs in one directory, on GSM8K's format or on sums."""
    sums = directory / "sums.jsonl"
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(5)]
    sums.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def configure(name: str, **sections: Any) -> RunConfig:
        return small_run(directory, name, tiny_checkpoint("qwen3"), sums, **sections)

    return configure


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    return read_metrics(config.path / "metrics.jsonl")


def stored(config: RunConfig) -> list[list[Trajectory]]:
    store = TrajectoryStore(config.path / "trajectories")
    return [store.read(step) for step in store.steps()]


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.path / "checkpoints").glob("step-*"))


def evaluations_of(config: RunConfig) -> list[tuple[int, str]]:
    """(step, suite) of every evaluation in the metrics, in order."""
    names = {"eval/accuracy": "data", "eval/short/accuracy": "short"}
    return [(line["step"], names[name]) for line in metrics_of(config) for name in names if name in line]


def assert_same_metrics(run: RunConfig, other: RunConfig) -> None:
    """Bit for bit, all but times and memory."""
    report = compare(metrics_of(run), metrics_of(other))
    assert report.exact, report.summary()
    assert report.compared > 20 * len(metrics_of(run))


@pytest.fixture(scope="module")
def gtpo(ranks: RankPool, make: Callable[..., RunConfig]) -> RunConfig:
    """Four steps of GTPO in one process, left alone."""
    config = make(
        "gtpo",
        data={"path": str(GSM8K), "format": "gsm8k"},
        training={"steps": 4},
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


def test_a_record_that_cannot_be_written_ends_no_run(ranks: RankPool, make: Callable[..., RunConfig]) -> None:
    config = make("no-record", training={"steps": 2})
    blocked = config.path / "trajectories" / "seen-00000000.parquet"
    blocked.mkdir(parents=True)
    (blocked / "file").touch()
    assert ranks.run(1, run_training, config) == [0]
    assert blocked.is_dir() and read_seen(blocked.parent, 1) is not None
    assert "step 1: what training saw" in (config.path / "logs" / "rank-0.log").read_text()


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
            if metric.startswith(("seconds/", "memory/", "logprob_gap/")) or metric == "tokens_per_second":
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


def test_dynamic_sampling_replaces_groups_without_signal(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    sections: dict[str, Any] = {
        "training": {"steps": 2},
        "rewards": {"terms": [reward("even_answers_only")]},
    }
    plain = make("plain-sampling", **sections)
    dynamic = make(
        "dynamic-sampling", rollout={"dynamic_sampling": {"enabled": True, "max_rounds": 10}}, **sections
    )
    for config in (plain, dynamic):
        assert ranks.run(1, run_training, config) == [0]
    assert any(line["groups/no_signal"] > 0 for line in metrics_of(plain))
    assert [line["groups/no_signal"] for line in metrics_of(dynamic)] == [0, 0]
    for batch in stored(dynamic):
        assert [(t.group, t.index) for t in batch] == [(g, i) for g in range(2) for i in range(4)]
        assert all(int(t.answer) % 2 == 0 for t in batch)
    seen = [t.prompt_id for batch in stored(dynamic) for t in batch if t.index == 0]
    assert len(set(seen)) == 4


def test_supervised_fine_tuning(ranks: RankPool, make: Callable[..., RunConfig]) -> None:
    config = make(
        "sft",
        data={"path": str(GSM8K), "format": "gsm8k"},
        algorithm={"name": "sft"},
        training={"steps": 5},
        optimizer={"lr": 3e-2},
    )
    assert ranks.run(1, run_training, config) == [0]
    lines = metrics_of(config)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert not any(name.startswith(("reward/", "gate/")) for line in lines for name in line)
    assert not (config.path / "trajectories").exists()
    resumed = make(
        "sft-resumed",
        data={"path": str(GSM8K), "format": "gsm8k"},
        algorithm={"name": "sft"},
        training={"steps": 2},
        optimizer={"lr": 3e-2},
    )
    for steps in (2, 5):
        training = resumed.training.model_copy(update={"steps": steps})
        assert ranks.run(1, run_training, resumed.model_copy(update={"training": training})) == [0]
    report = compare(lines, metrics_of(resumed))
    assert report.exact, report.summary()


def test_grpo_with_a_reference_policy_and_two_updates(
    ranks: RankPool, make: Callable[..., RunConfig]
) -> None:
    config = make(
        "grpo",
        algorithm={"name": "grpo", "kl_beta": 0.1, "updates_per_batch": 2, "clip_high": 1e-4},
        training={"steps": 2},
    )
    assert ranks.run(1, run_training, config) == [0]
    lines = metrics_of(config)
    assert [line["lr"] for line in lines] == [1e-2, 1e-2]  # the warm-up of two updates is the first step's
    # figures are those of the last update, when the policy has left both the old and the reference policy
    assert all(line["kl/mean"] > 0 for line in lines)
    assert all(line["ratio/clipped_share"] > 0 for line in lines)
    assert "gate/pass_rate" not in lines[0] and lines[0]["entropy/initial"] is None


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


def test_the_truncated_share_is_one_of_what_is_weighed() -> None:
    from gtpo_megatron.policy.step import PassResult
    from gtpo_megatron.train import policy_metrics

    values = {name: np.zeros(2) for name in ("entropy", "gap", "gap_max")}
    passed = PassResult(loss=0.0, completions=values, sums={"importance_truncated": 3.0})
    for level, share in (("token", 3 / 12), ("sequence", 3 / 4)):
        assert policy_metrics(passed, 12, 4, level)["importance/truncated_share"] == share


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


def test_solutions_that_are_too_long_are_left_out_of_supervised_fine_tuning(
    ranks: RankPool, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rows = [{"question": f"{a} + 1 =", "answer": str(a + 1), "solution": "count on"} for a in range(8)]
    rows[3]["solution"] = "count on " * 400
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sections = {"algorithm": {"name": "sft"}, "training": {"steps": 4}}
    config = make("long-solution", data={"path": str(path), "fields": {"solution": "solution"}}, **sections)
    assert ranks.run(1, run_training, config) == [0]
    assert "1 prompts left out, too long with" in (config.path / "logs" / "rank-0.log").read_text()
    path.write_text(json.dumps(rows[3]))
    nothing = make("long-solutions", data={"path": str(path), "fields": {"solution": "solution"}}, **sections)
    (message,) = ranks.run(1, run_training, nothing)
    assert "none of 1 prompts" in message and "training.micro_batch_tokens" in message
    assert not (nothing.path / "metrics.jsonl").exists()
