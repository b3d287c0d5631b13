"""Runs of the other algorithms, and ways to choose what is trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gtpo_megatron.config import RunConfig
from gtpo_megatron.run.verify_resume import compare
from tests.parallel.pool import RankPool
from tests.train.runs import GSM8K, metrics_of, stored
from tests.training_jobs import reward, run_training


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


def test_the_truncated_share_is_one_of_what_is_weighed() -> None:
    from gtpo_megatron.policy.step import PassResult
    from gtpo_megatron.train import policy_metrics

    values = {name: np.zeros(2) for name in ("entropy", "gap", "gap_max")}
    passed = PassResult(loss=0.0, completions=values, sums={"importance_truncated": 3.0})
    for level, share in (("token", 3 / 12), ("sequence", 3 / 4)):
        assert policy_metrics(passed, 12, 4, level)["importance/truncated_share"] == share


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
