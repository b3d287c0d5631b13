"""Several runs in one report: recipes are found, seeds become a mean and a band, what differs is said."""

import io
import json
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from gtpo_megatron.analysis.recipes import compare_runs
from gtpo_megatron.commands.cli import main
from gtpo_megatron.errors import UserError
from tests.analysis.test_report import gtpo_row, make_run


def run(
    folder: Path, name: str, algorithm: str, seed: int, rewards: list[float], accuracy: float = 0.5
) -> Path:
    rows = [gtpo_row(step) | {"loss": 0.0, "reward/mean": r} for step, r in enumerate(rewards, start=1)]
    rows.append({"step": len(rewards), "time": 0.0, "eval/accuracy": accuracy})
    path = make_run(folder / name, rows, algorithm)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["training"]["seed"] = seed
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def compared(run_dirs: list[Path], folder: Path) -> tuple[str, str]:
    console = Console(file=io.StringIO(), width=240)
    page = compare_runs(run_dirs, folder, console).read_text()
    assert imread(folder / "comparison.png").shape[0] > 200
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.md", "comparison.png"]
    return page, console.file.getvalue()


def test_seeds_of_a_recipe_are_one_column(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, "gtpo-seed1", "gtpo", 1, [3.0, 5.0], accuracy=0.75),
        run(tmp_path, "grpo", "grpo", 0, [7.0, 8.0, 9.0]),
        run(tmp_path, "gtpo-seed0", "gtpo", 0, [1.0, 2.0, 100.0], accuracy=0.25),
    ]
    page, printed = compared(runs, tmp_path / "out")
    assert "| gtpo | 0, 1 | 2 |" in page  # one seed has no third step
    assert "| grpo | 0 | 3 |" in page
    assert "| reward/mean | 2 (1 to 3) → 3.5 (2 to 5) | 7 → 9 |" in page
    assert (
        "| eval/accuracy | 0.5 (0.25 to 0.75) → 0.5 (0.25 to 0.75) |" not in page
    )  # measured at other steps
    assert "| `algorithm.name` | `gtpo` | `grpo` |" in page
    assert "training.seed" not in page
    assert "gtpo (2 seeds)" in printed and "3.5 (2 to 5)" in printed
    assert "| loss |" in page and "seconds/" not in page


def test_accuracies_of_suites_stand_among_the_main_figures(tmp_path: Path) -> None:
    runs = [run(tmp_path, name, name, 0, [1.0]) for name in ("gtpo", "grpo")]
    for path in runs:
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "time": 0.0, "eval/gsm8k/accuracy": 0.25, "eval/gsm8k/format": 1.0}\n')
    page, printed = compared(runs, tmp_path / "out")
    assert "eval/gsm8k/accuracy" in printed and "eval/gsm8k/format" not in printed
    assert "| eval/gsm8k/format | 1 → 1 | 1 → 1 |" in page


def test_one_recipe_has_nothing_that_differs(tmp_path: Path) -> None:
    page, _ = compared([run(tmp_path, f"a-seed{k}", "gtpo", k, [1.0]) for k in (1, 0)], tmp_path / "out")
    assert "## What differs" not in page
    assert "| entropy/mean | 0.9 (0.9 to 0.9) → 0.9 (0.9 to 0.9) |" in page


def test_two_recipes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = (run(tmp_path / part, "run", part, 0, [1.0]) for part in ("gtpo", "grpo"))
    page, _ = compared([a, b], tmp_path / "out")
    assert f"| metric | run | {b} |" in page


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(tmp_path, "good", "gtpo", 0, [1.0])
    with pytest.raises(UserError, match="given twice"):
        compare_runs([good, tmp_path / "." / "good"], tmp_path)
    with pytest.raises(UserError, match="nowhere: no metrics.jsonl"):
        compare_runs([good, tmp_path / "nowhere"], tmp_path)
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(UserError, match="no step is finished yet"):
        compare_runs([good, empty], tmp_path)
    for arguments, message in (
        ([str(good), "--output", str(tmp_path)], "--output is for several runs"),
        ([str(good), str(tmp_path)], "no metrics.jsonl"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_command_writes_beside_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (run(tmp_path / "runs", f"{name}", name, 0, [1.0, 2.0]) for name in ("gtpo", "grpo"))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(a), str(b)])
    assert not ended.value.code
    assert str(tmp_path / "runs" / "comparison.md") in capsys.readouterr().out
    assert (
        json.loads((a / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    )  # nothing of the runs changed
