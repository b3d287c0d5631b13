"""What tests see of runs on the virtual cluster, and how they hold them."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gtpo_megatron.run.metrics import is_measured, read_metrics

TRAIN = (sys.executable, "-m", "gtpo_megatron")
ROOT = Path(__file__).parents[2]


def user_environment() -> dict[str, str]:
    """Of a user on the login node, whose jobs take it over: this project's code, and nothing of an outer launcher."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s} s: {what}"
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path)] if path.exists() else []


def figures(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    return [
        {name: value for name, value in row.items() if not is_measured(name)}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def last_line(run: Path, job_id: str) -> str:
    return (run / f"slurm-{job_id}.log").read_text().splitlines()[-1]


def hold(run: Path, step: int) -> None:
    """Let the run wait after this step."""
    partial = run.parent / "hold.partial"
    partial.write_text(f"{run / 'metrics.jsonl'} {step}")
    partial.replace(run.parents[1] / "hold")


def wait_until_held(run: Path, step: int) -> None:
    """Until the run stands where `hold` lets it wait: the next step's batch is sampled, and being scored."""
    reached = run.parents[1] / "hold.reached"
    wait_until(lambda: reached.exists() and reached.read_text() == str(step), f"scoring after step {step}")


def ended(run: Path) -> list[list[str]]:
    return [line.split() for line in (run / "attempts" / "ended").read_text().splitlines()]
