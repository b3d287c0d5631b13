"""Sweeps: which runs a file gives, and how they are run, stopped and gone on with."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from gtpo_megatron.commands.cli import main
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.sweep.design import Planned, load_sweep
from gtpo_megatron.sweep.runner import Runner, is_complete, log_of

ROOT = Path(__file__).parents[2]
RECIPE = {"name": "x", "model": {"path": "m"}, "data": {"path": "d"}, "training": {"steps": 2, "seed": 7}}
# Ends as its run's directory has it in "plan": with an exit code, or after a signal.
TRAINER = """
import json, os, pathlib, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
path = pathlib.Path(config["dir"]) / config["name"]
path.mkdir(parents=True, exist_ok=True)
starts = path / "starts"
starts.write_text(str(int(starts.read_text()) + 1 if starts.exists() else 1))
print("training", config["algorithm"]["gamma"], flush=True)
plan = config["algorithm"]["positive_weight"]
if plan == 7:
    sys.exit(1)
if plan == 3 and starts.read_text() == "1":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    (path / "ready").touch()
    time.sleep(600)
status = dict(state="complete", message="", step=config["training"]["steps"], steps=2, stage="", stage_since=0.0,
              heartbeat=0.0, host="h", pid=1, job_id=None, checkpoint_step=2, checkpoint_time=0.0, exit_code=0)
(path / "status.json").write_text(json.dumps(status))
"""


def write(tmp_path: Path, axes: object, **more: object) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"dir": str(tmp_path / "runs")}))
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "recipe": "recipe.yaml", "axes": axes} | more, sort_keys=False)
    )
    return path


def runner(tmp_path: Path, said: list[str]) -> Runner:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return Runner(said.append, (sys.executable, str(tmp_path / "trainer.py")))


def starts(run: Planned) -> int:
    return int((run.config.path / "starts").read_text())


def test_every_combination_is_a_run_with_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("algorithm: {name: grpo}")
    axes = {
        "arm": {"gtpo": [], "grpo": ["overlay.yaml"]},
        "lr": {"low": ["optimizer.lr=1e-6"], "high": ["optimizer.lr=1e-3"]},
    }
    runs = load_sweep(write(tmp_path, axes, settings=["training.steps=5"], seeds=2), ["rollout.group_size=4"])
    assert [run.name for run in runs][:3] == ["s-gtpo-low-seed0", "s-gtpo-low-seed1", "s-gtpo-high-seed0"]
    assert len(runs) == 8 and runs[-1].labels == {"arm": "grpo", "lr": "high", "seed": "1"}
    config = runs[-1].config
    assert (config.name, config.algorithm.name, config.optimizer.lr) == ("s-grpo-high-seed1", "grpo", 1e-3)
    assert (config.training.seed, config.training.steps, config.rollout.group_size) == (1, 5, 4)
    assert len({run.config.path for run in runs}) == 8
    # without seeds, the recipe's own
    assert load_sweep(write(tmp_path, {"arm": {"a": []}}))[0].config.training.seed == 7


def test_runs_can_be_ordered_by_seed(tmp_path: Path) -> None:
    axes = {"arm": {"a": [], "b": []}}
    runs = load_sweep(write(tmp_path, axes, seeds=2, first_seed=7, by_seed=True))
    assert [run.name for run in runs] == ["s-a-seed7", "s-b-seed7", "s-a-seed8", "s-b-seed8"]
    assert [run.config.training.seed for run in runs] == [7, 7, 8, 8]


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ({"arm": {}}, {}, "axis arm has no labels"),
        ({"arm": {"a/b": []}}, {}, "label 'a/b' is part of a directory's name"),
        (
            {"arm": {"a": ["algorithm.gama=1"]}},
            {},
            "run s-a: override 'algorithm.gama=1'.*did you mean algorithm.gamma",
        ),
        ({"arm": {"a": ["name=b"]}}, {}, "name is set by the sweep itself"),
        ({"arm": {"a": ["training.seed=1"]}}, {}, "training.seed is set by the sweep itself"),
        ({"arm": {"a": []}}, {"seed": 3}, "did you mean seeds"),
        ({"one": {"a": [], "a-b": []}, "two": {"b-c": [], "c": []}}, {}, "give one name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, axes: object, more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(write(tmp_path, axes, **more))


def test_runs_that_fail_do_not_keep_others_from_running(tmp_path: Path) -> None:
    axes = {
        "arm": {
            "a": ["algorithm.gamma=0.1"],
            "bad": ["algorithm.positive_weight=7"],
            "c": ["algorithm.gamma=0.3"],
        }
    }
    runs, said = load_sweep(write(tmp_path, axes)), []
    assert runner(tmp_path, said).run(runs, jobs=2) == {"s-a": 0, "s-bad": 1, "s-c": 0}
    assert any("s-bad: failed with exit code 1" in line for line in said)
    assert log_of(runs[2]).read_text() == "training 0.3\n"
    # again: complete ones are left alone, the failed one is tried again
    assert [is_complete(run) for run in runs] == [True, False, True]
    assert runner(tmp_path, said).run(runs, jobs=1) == {"s-a": 0, "s-bad": 1, "s-c": 0}
    assert [starts(run) for run in runs] == [1, 2, 1]
    # more steps: they are not complete any more
    longer = load_sweep(tmp_path / "sweep.yaml", ["training.steps=3"])
    assert not is_complete(longer[0])


def test_a_signal_stops_the_runs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    axes = {"arm": {"long": ["algorithm.positive_weight=3"], "next": []}}
    runs, said = load_sweep(write(tmp_path, axes)), []

    def stop() -> None:
        while not (runs[0].config.path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    assert runner(tmp_path, said).run(runs, jobs=1) == {"s-long": 3}
    assert "stopping: 1 runs save and end" in said
    assert not runs[1].config.path.exists()
    assert runner(tmp_path, said).run(runs, jobs=1) == {"s-long": 0, "s-next": 0}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_sweeps_of_the_project_are_valid(path: Path) -> None:
    runs = load_sweep(path)
    assert len(runs) > 1
    settings = {json.dumps(run.config.model_dump(mode="json", exclude={"name"})) for run in runs}
    assert len(settings) == len(runs)  # no label is without effect


def test_the_command_lists_and_writes_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"arm": {"a": ["algorithm.gamma=0.5"], "b": []}})

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["sweep", str(path), *arguments])
        return (end.value.code or 0, *capsys.readouterr())

    assert "s-a" in run("--list")[1]
    code, out, _ = run("--index", "0", "--write", str(tmp_path / "written"))
    assert code == 0 and [Path(line).name for line in out.split()] == ["s-a.yaml"]
    assert load_config(tmp_path / "written" / "s-a.yaml").algorithm.gamma == 0.5
    assert "has 2 runs, 0 to 1" in run("--index", "2")[2]
    assert "no run of" in run("--only", "c")[2]
