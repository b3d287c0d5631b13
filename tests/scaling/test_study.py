"""Scaling studies: their runs, what a report makes of recorded ones, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.commands.cli import main
from gtpo_megatron.config.loading import load_config, save_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import find_gpu
from gtpo_megatron.scaling.report import layout
from gtpo_megatron.scaling.study import node_counts, settings, study
from tests.scaling.recorded import recipe, row, write_run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A run on so many ranks, of which the first two steps are slow."""

    def run(
        ranks: int, *, training: float = 1.0, tokens: float = 1e6, device: Any = None, **sections: Any
    ) -> Path:
        config = recipe(tmp_path, f"r-{ranks}", **sections)
        values = {"seconds__training": training * 80 / ranks, "tokens": tokens}
        slow = [row(step, ranks, **values | {"seconds__training": 500.0}) for step in (1, 2)]
        rows = [*slow, *(row(step, ranks, **values) for step in (3, 4, 5, 6))]
        return write_run(config, ranks, rows, **({"device": device} if device else {}))

    return run


def said(runs: list[Path], warmup: int = 2) -> str:
    with pytest.raises(UserError) as error:
        study(runs, warmup)
    return str(error.value)


def test_strong_scaling_is_held_against_the_smallest_run(make: Callable[..., Path]) -> None:
    made = study([make(16, training=1.25), make(8)], 2)  # in any order
    small, large = made.points
    assert made.kind == "strong" and made.gpu == find_gpu("h100-sxm")
    assert (small.measured.ranks, small.measured.steps, small.measured.dropped) == (8, 4, 2)
    assert small.measured.seconds["training"] == 10 and large.measured.seconds["training"] == 6.25
    assert (small.efficiency, small.efficiency_training) == (1, 1)
    assert large.efficiency_training == pytest.approx(10 / 6.25 / 2)
    assert large.efficiency == pytest.approx(52 / 48.25 / 2)
    assert small.measured.mfu_training == pytest.approx(4e16 / 10 / 8 / 989e12)
    assert small.plan is not None and large.plan is not None
    assert small.plan.step.training.total > large.plan.step.training.total


def test_weak_scaling_keeps_the_work_of_a_rank(make: Callable[..., Path]) -> None:
    larger = make(16, training=2.0, tokens=2e6, rollout={"prompts_per_step": 128})
    made = study([make(8), larger], 2)
    assert made.kind == "weak"
    assert made.points[1].efficiency_training == pytest.approx(1)


def test_traced_steps_do_not_count(make: Callable[..., Path]) -> None:
    made = study([make(8, training=1.0), make(16)], 0)
    assert made.points[0].measured.seconds["training"] > 100  # with the slow ones
    file = made.points[0].measured.run / "config.yaml"
    save_config(load_config(file, ["training.profile.steps=[1,2]"]), file)
    again = study([point.measured.run for point in made.points], 0)
    assert again.points[0].measured.seconds["training"] == 10
    assert again.points[0].measured.dropped == 2


def test_a_layout_of_its_own_is_the_same_recipe(make: Callable[..., Path]) -> None:
    made = study([make(8), make(16, parallel={"tensor": 2})], 2)
    assert [layout(point.measured.facts.parallel) for point in made.points] == ["data", "tensor 2"]


def test_what_is_no_study(make: Callable[..., Path], tmp_path: Path) -> None:
    small = make(8)
    assert "both of 8 ranks" in said([small, small])
    other = make(16, algorithm={"gamma": 0.7})
    assert "runs of different recipes (algorithm.gamma: 0.1 and 0.7)" in said([small, other])
    batch = make(24, rollout={"prompts_per_step": 65})
    assert "neither the same (strong scaling) nor as many a rank (weak)" in said([small, batch])
    cpu = make(32, device="cpu")
    assert "on different devices (NVIDIA H100 80GB HBM3, cpu)" in said([small, cpu])
    assert "6 steps of training, all of which are of the warm-up (6 steps)" in said([small], warmup=6)
    assert "run.json: no such file" in said([tmp_path / "nothing"])
    (small / "metrics.jsonl").unlink()
    assert "metrics.jsonl: no such file" in said([small])


def test_a_run_of_an_older_version_and_one_of_two_sizes(make: Callable[..., Path]) -> None:
    run = make(8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line | {'world_size': 4})}\n" for line in lines))
    assert "steps of 4 and 8 ranks" in said([run])
    without = [{key: value for key, value in line.items() if key != "model_flop"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in without))
    assert "step 3 has no model_flop; it was trained by an older version" in said([run])


def test_the_command_writes_table_plot_and_json(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make(ranks)) for ranks in (8, 16)]
    with pytest.raises(SystemExit):
        main(["scaling-report", *runs, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [run["ranks"] for run in found["runs"]] == [8, 16]
    assert found["runs"][1]["efficiency_training"] == pytest.approx(1)
    assert found["runs"][0]["plan"]["seconds"]["training"] > 0
    page = (tmp_path / "scaling.md").read_text()
    assert "# Strong scaling of Llama-3.1-8B-Instruct" in page and "| 16 | 2 | data | 512 |" in page
    assert "The planner's expectation for h100-sxm:" in page
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["scaling-report", *runs, "--output", str(tmp_path / "elsewhere")])
    assert "training efficiency" in capsys.readouterr().out
    assert (tmp_path / "elsewhere" / "scaling.md").read_text() == page


def test_where_the_gpu_is_not_known_there_is_a_plan_only_for_one_that_is_named(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make(ranks, device="cpu")) for ranks in (8, 16)]
    for words, sentence in (
        ([], "No plan beside it: plan/machines.yaml does not know cpu"),
        (["--gpu", "a100"], "expectation for a100, which these runs did not have (cpu):"),
    ):
        with pytest.raises(SystemExit):
            main(["scaling-report", *runs, *words])
        assert sentence in (tmp_path / "scaling.md").read_text()
    capsys.readouterr()


def test_the_runs_of_a_study(tmp_path: Path) -> None:
    config = recipe(tmp_path, "trial")
    assert settings(config, 4, 2, "strong") == ["name=trial-strong-4"]
    assert settings(config, 4, 2, "weak") == ["name=trial-weak-4", "rollout.prompts_per_step=128"]
    sft = recipe(
        tmp_path,
        "s",
        algorithm={"name": "sft"},
        training={"sft_batch_size": 12},
        rollout={"engine": "embedded"},
    )
    assert settings(sft, 3, 1, "weak") == ["name=s-weak-3", "training.sft_batch_size=36"]
    with pytest.raises(UserError, match="64 for 3 nodes is no whole number for 4"):
        settings(config, 4, 3, "weak")


@pytest.mark.parametrize("text", ["", "2", "1,x", "0,1", "1,1", "1,,2", "-1,2", "1.5,2"])
def test_numbers_of_nodes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected two or more different numbers of nodes"):
        node_counts(text)
    assert node_counts("4, 1,2") == [1, 2, 4]
