"""Replay: recorded steps agree with a float64 program that shares no line with training, and what was changed is found."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gtpo_megatron.commands.cli import main
from gtpo_megatron.config import AlgorithmConfig, RunConfig
from gtpo_megatron.replay import float64, replay
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.layout_job import sample_batch
from tests.parallel.pool import RankPool
from tests.replay.replay_jobs import run_replay
from tests.training_jobs import run_training, small_run

RUNS: dict[str, dict[str, Any]] = {
    "gtpo": {"algorithm": {"gate": {"mode": "off"}}, "checkpoint": {"every": 2}},
    "gate": {
        "algorithm": {"gate": {"mode": "only_negative", "threshold": 4.0}},
        "logging": {"seen": "completions"},
    },
    "reference": {"algorithm": {"compat": "reference"}, "rollout": {"temperature": 0.7}},
    "grpo": {
        "algorithm": {"name": "grpo", "kl_beta": 0.5, "importance": {"level": "token", "cap": 1.01}},
        "rollout": {"staleness": 1},
    },
}


@pytest.fixture(scope="module")
def record(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[[str], RunConfig]:
    """The configuration of a run of four steps, trained when it is first asked for."""
    directory, made = tmp_path_factory.mktemp("runs"), {}
    sums = directory / "sums.jsonl"
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(5)]
    sums.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def make(name: str) -> RunConfig:
        if name not in made:
            sections = {"training": {"steps": 4}} | RUNS[name]
            made[name] = small_run(directory, name, tiny_checkpoint("qwen3"), sums, **sections)
            assert ranks.run(1, run_training, made[name]) == [0]
        return made[name]

    return make


# step 1 is the model's; step 3 stands on a checkpoint; before step 4 one step behind it is trained again
@pytest.mark.parametrize(
    ("name", "step", "said"),
    [
        ("gtpo", 1, "as the run began"),
        ("gtpo", 3, "step-000002"),
        ("gtpo", 4, "step-000002, 1 steps trained again"),
        ("gate", 2, "1 steps trained again"),
        ("reference", 1, "as the run began"),
        ("grpo", 3, "2 steps trained again"),
    ],
)
def test_a_recorded_step_agrees(
    name: str, step: int, said: str, ranks: RankPool, record: Callable[[str], RunConfig]
) -> None:
    (found,) = ranks.run(1, run_replay, record(name).path, step)
    assert found["agrees"], found["checks"]
    assert said in found["said"][0]
    checks = {check["name"]: check for check in found["checks"]}
    compared = {"loss", "grad_norm", "advantage", "coefficient", "entropy"}
    compared |= {"prefix", "suffix", "gate"} if name != "grpo" else set()
    assert checks.keys() == compared | ({"logprob"} if name != "gate" else set())
    assert all(check["recorded"] is not None and check["difference"] < 1e-5 for check in found["checks"])
    assert sum(row["share"] for row in found["completions"]) == pytest.approx(
        checks["loss"]["recomputed"], abs=1e-12
    )
    assert bool(found["missing"]) == (name == "gate")


def copied(config: RunConfig, target: Path) -> Path:
    shutil.copytree(config.path, target)
    return target


def changed_metric(run_dir: Path, name: str, factor: float) -> None:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if name in row:
            row[name] *= factor
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_what_a_run_did_otherwise_is_found(
    ranks: RankPool, record: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    norm = copied(record("gtpo"), tmp_path / "norm")
    changed_metric(norm, "grad_norm", 1.001)
    reward = copied(record("gtpo"), tmp_path / "reward")
    store = TrajectoryStore(reward / "trajectories")
    batch = store.read(0)
    object.__setattr__(batch[1], "reward", batch[1].reward + 1.0)
    store.write(0, batch)
    other = copied(record("gtpo"), tmp_path / "gamma")
    text = (other / "config.yaml").read_text()
    assert "gamma: 0.1" in text
    (other / "config.yaml").write_text(text.replace("gamma: 0.1", "gamma: 0.2"))
    for run_dir, beyond in (
        (norm, {"grad_norm"}),
        (reward, {"grad_norm", "advantage", "coefficient"}),  # the loss is a sum of advantages, 0 still
        (other, {"loss", "grad_norm", "coefficient"}),
    ):
        (found,) = ranks.run(1, run_replay, run_dir, 1)
        wrong = {c["name"] for c in found["checks"] if c["difference"] > found["tolerance"]}
        assert not found["agrees"] and wrong >= beyond and "entropy" not in wrong, found["checks"]


def test_what_cannot_be_replayed_is_said(
    ranks: RankPool, record: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    run_dir = copied(record("gtpo"), tmp_path / "run")
    ask = lambda step: ranks.run(1, run_replay, run_dir, step)[0]  # noqa: E731
    assert "have no such step (steps: 1 to 4)" in ask(5)
    (run_dir / "trajectories" / "step-00000002.parquet").unlink()
    assert "step 3 has to be trained again" in ask(4)
    assert "step 2 is not stored" in ask(3)
    for section, reason in (
        ("name: gtpo\n", "name: sft\n"),
        ("updates_per_batch: 1", "updates_per_batch: 2"),
        ("lora: null", "lora: {rank: 4, alpha: 4}"),
    ):
        text = (record("gtpo").path / "config.yaml").read_text()
        assert section in text
        (run_dir / "config.yaml").write_text(text.replace(section, reason))
        assert "cannot be replayed" in ask(1) or "stores no batches" in ask(1)


def test_the_recomputation_imports_nothing_that_it_checks() -> None:
    source = Path(float64.__file__).read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    ours = {name for name in names if name.startswith("gtpo_megatron")}
    assert ours == {"gtpo_megatron.errors", "gtpo_megatron.trajectories.record"}
    assert not any(name.startswith("megatron") for name in names)


@pytest.mark.parametrize(
    ("compat", "negative", "normalize"),
    [("paper", 0.0, None), ("reference", 0.0, None), ("paper", 0.5, "std"), ("reference", 1.0, "mean")],
)
def test_its_parts_are_those_of_the_algorithm(compat: str, negative: float, normalize: str | None) -> None:
    """The two programs on many batches; the runs above have few conflicts."""
    from gtpo_megatron.algorithm import completion_normalizers, conflict_runs, group_advantages, token_weights

    for seed in range(10):
        batch = sample_batch(seed=seed)
        config = AlgorithmConfig(compat=compat, negative_weight=negative, normalize=normalize)
        parts = float64.parts_of(batch, config.model_dump())
        groups = torch.tensor([t.group for t in batch])
        rewards = torch.tensor([t.reward for t in batch], dtype=torch.float64)
        advantages = group_advantages(rewards, groups, config.advantages)
        lengths = torch.tensor([t.length for t in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, t in enumerate(batch):
            ids[row, : t.length] = torch.tensor(t.token_ids)
        prefix, suffix = conflict_runs(ids, lengths, advantages, groups)
        weights = token_weights(
            prefix, suffix, lengths, advantages, ids.shape[1], 2.0, compat, negative_weight=negative
        )
        counts = completion_normalizers(groups, prefix, suffix, compat)
        assert int(prefix.sum()) > 0
        for row, part in enumerate(parts):
            assert (part.prefix, part.suffix) == (int(prefix[row]), int(suffix[row]))
            assert part.advantage == pytest.approx(float(advantages[row]), abs=1e-12)
            assert part.divisor == float(counts[row] * lengths[row])
            np.testing.assert_array_equal(part.weights.numpy(), weights[row, : lengths[row]].double().numpy())


@pytest.mark.parametrize(("difference", "code", "verdict"), [(1e-9, 0, "within"), (1e-2, 1, "BEYOND")])
def test_the_command_tells_by_its_exit_code(
    difference: float,
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    checks = (
        replay.Check("loss", 0.5, 0.5 + difference, difference, 1.0),
        replay.Check("grad_norm", None, 2.0, None, 2.0),
    )
    found = replay.Replay(3, checks, (), ("the run recorded no norm",), 1e-4)
    asked: list[Any] = []
    monkeypatch.setattr(replay, "replay", lambda *arguments, **_: asked.append(arguments) or found)
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["replay", str(tmp_path), "--step", "3", *options])
        assert ended.value.code == code
        out = capsys.readouterr().out
        if options:
            assert json.loads(out)["agrees"] is not bool(code)
            assert [check["name"] for check in json.loads(out)["checks"]] == ["loss", "grad_norm"]
        else:
            assert f"{verdict} the tolerance of 0.0001" in out
            assert "not compared: the run recorded no norm" in out
            assert "not recorded" in out
    assert asked == [(tmp_path, 3, None)] * 2
