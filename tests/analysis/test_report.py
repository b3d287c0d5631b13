"""The report of long, short, supervised and broken runs."""

import io
import json
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from gtpo_megatron.analysis.report import write_report
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.trajectories.test_store import trajectory


def make_run(run_dir: Path, rows: list[dict], algorithm: str = "gtpo") -> Path:
    run_dir.mkdir(parents=True)
    config = {
        "name": run_dir.name,
        "model": {"path": "models/small", "dtype": "fp32"},
        "data": {"path": "data|set"},
        "algorithm": {"name": algorithm, "compat": "paper"},
        "rollout": {"group_size": 8},
        "training": {"steps": 40, "sft_batch_size": 16, "seed": 1},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run_dir


def gtpo_row(step: int) -> dict:
    return {
        "step": step,
        "time": 60.0 * step,
        "reward/mean": float(step),
        "reward/std": 1.0,
        "reward/format": step / 2,
        "entropy/mean": 0.9,
        "entropy/p10": 0.1,
        "entropy/p90": 1.9,
        "conflict/protected_share": 0.25,
        "response/length_mean": 1500.0,
        "grad_norm": None if step == 3 else 0.5,
        "lr": 1e-6,
        "logprob_gap/mean": 1e-5,
        "logprob_gap/max": 0.0,
        "seconds/rollout": 3.0,
        "seconds/update": 1.0,
    }


def report(run_dir: Path) -> tuple[str, str]:
    """(summary, what was printed)."""
    console = Console(file=io.StringIO(), width=200)
    summary = write_report(run_dir, console).read_text()
    assert imread(run_dir / "report.png").shape[0] > 200
    return summary, console.file.getvalue()


def test_a_long_run_compares_its_first_steps_with_its_last(tmp_path: Path) -> None:
    rows = [{"step": 0, "time": 0.0, "eval/accuracy": 0.125}, *(gtpo_row(step) for step in range(1, 41))]
    run_dir = make_run(tmp_path / "long-run", [*rows, {"step": 40, "time": 2401.0, "eval/accuracy": 0.5}])
    completion = "<reasoning>\nwork\n</reasoning>" + "x" * 1000
    TrajectoryStore(run_dir / "trajectories").write(
        40,
        [
            trajectory(reward=1.0, text="bad"),
            trajectory(reward=11.5, reward_terms={"format": 10.0}, text=completion),
        ],
    )
    summary, printed = report(run_dir)
    assert summary.startswith("# long-run\n\nGTPO, 40 of 40 steps, 40.0 minutes")
    assert "the last 5 steps, averaged;" in summary
    assert "| reward/mean | 3 | 38 |" in summary
    assert "| eval/accuracy | 0.125 | 0.5 |" in summary
    assert "| lr | 1.00e-06 | 1.00e-06 |" in summary
    assert "| response/length_mean | 1500 | 1500 |" in summary
    assert "| rollout | 3.00 | 75% |" in summary and "seconds/rollout" not in summary
    assert "| `data.path` | `data\\|set` |" in summary and "sft_batch_size" not in summary
    assert "reward 11.5 (format 10), 3 tokens" in summary and "    <reasoning>\n    work\n" in summary
    assert "x" * 600 not in summary and "bad" not in summary
    assert "- `report.png`" in summary and "- `trajectories/`" in summary
    assert "reward/mean" in printed and str(run_dir / "report.png") in printed


def test_suites_have_a_row_each(tmp_path: Path) -> None:
    def line(step: int, suite: str, **figures: float) -> dict:
        return {"step": step, "time": 60.0 * step} | {f"eval/{suite}/{k}": v for k, v in figures.items()}

    rows = [
        line(0, "gsm8k", accuracy=0.25, prompts=200),
        line(0, "math500", accuracy=0.125, prompts=500, **{"pass@4": 0.5}),
        gtpo_row(1),
        line(1, "gsm8k", accuracy=0.5, prompts=200),
        line(1, "math500", accuracy=0.125, prompts=500, **{"pass@4": 0.75}),
    ]
    summary, printed = report(make_run(tmp_path / "suites", rows))
    assert "| suite | accuracy | prompts | pass@4 |" in summary
    assert "| gsm8k | 0.25 → 0.5 | 200 | - |" in summary
    assert "| math500 | 0.125 | 500 | 0.5 → 0.75 |" in summary
    assert "eval/gsm8k/accuracy" not in summary
    assert "eval/gsm8k/accuracy" in printed


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    summary, _ = report(make_run(tmp_path / "short", [gtpo_row(1)]))
    assert "| reward/mean | 1 | 1 |" in summary and "the last step;" in summary


def test_a_supervised_run_shows_its_loss(tmp_path: Path) -> None:
    rows = [
        {"step": step, "time": float(step), "loss": 1.0 / step, "grad_norm": 1.0} for step in (1, 2, 3, 4)
    ]
    summary, _ = report(make_run(tmp_path / "sft", rows, algorithm="sft"))
    assert "| loss | 1 | 0.25 |" in summary
    assert "training.sft_batch_size" in summary and "rollout.group_size" not in summary
    assert "Seconds per step" not in summary and "best completion" not in summary


@pytest.mark.parametrize("name", ["summary.md", "report.png"])
def test_a_report_that_cannot_be_written_is_said(name: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [gtpo_row(1)])
    (run_dir / name).mkdir()
    with pytest.raises(
        UserError, match="run: the report cannot be written there: Is a directory; copy the run"
    ):
        write_report(run_dir)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.yaml: no such file; is .* the directory of a run\?"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl: no step is finished yet"):
        write_report(make_run(tmp_path / "empty", []))
