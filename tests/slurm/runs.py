"""What tests see of runs on the virtual cluster, and how they hold them."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gtpo_megatron.cluster.record import SERVERS
from gtpo_megatron.registry import registered
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


def small_recipe(directory: Path, name: str, checkpoint: Path) -> dict[str, Any]:
    """A small GTPO run in `directory`, two ranks at tensor 2, all paths absolute, its prompts written there. It can be held
    after a step, see `hold`."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"question": "{n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(16)))
    reward = {
        "kind": "python",
        "name": "characters",
        "function": "tests.training_rewards:different_characters_when_let_go",
        "options": {"hold": str(directory / "hold")},
    }
    return {
        "name": name,
        "dir": str(directory / "runs"),
        "model": {"path": str(checkpoint), "dtype": "fp32"},
        "data": {"path": str(prompts), "system_prompt": "", "max_prompt_tokens": 120},
        "parallel": {"tensor": 2},
        "training": {"steps": 12, "micro_batch_tokens": 256},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "rewards": {
            "workers": 1,
            "timeout_s": 600,
            "terms": [reward],
        },  # a batch that is held is scored all the same
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": "off"},
    }


def virtual_site() -> dict[str, Any]:
    """The virtual cluster's facts: nodes without GPUs, two ranks fit on one, gloo on eth0; no screening, for haste."""
    return {
        "partition": "batch",
        "time": "02:00:00",
        "gpus_per_node": 0,
        "ranks_per_node": 1,
        "sbatch": ["--mem=1000"],
        "python": sys.executable,
        "interface": "eth0",
        "screening_s": 0,
    }


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def change(path: Path, **values: object) -> None:
    """Keys of a YAML file."""
    write_yaml(path, yaml.safe_load(path.read_text()) | values)


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


def wait_until_held(run: Path, step: int, samplers: int = 2) -> None:
    """Until the run stands where `hold` lets it wait: the next step's batch is sampled, and being scored, by as many ranks as
    sample. A stop would cut short what one still samples."""
    folder = run.parents[1]

    def held() -> bool:
        return sum(path.read_text() == str(step) for path in folder.glob("hold.reached.*")) >= samplers

    wait_until(held, f"scoring after step {step}")


def ended(run: Path) -> list[list[str]]:
    return [line.split() for line in (run / "attempts" / "ended").read_text().splitlines()]


def registered_urls(run: Path) -> list[str]:
    """Servers that say that they are up."""
    return [server.url for server in registered(run / SERVERS)]


def wrong_with_served(run: Path, count: int) -> list[str]:
    """What does not hold of a run whose servers were certified at each step: every step is there once, and they sampled with
    the trainer's weights. Their tokens are not the same from run to run."""
    rows = read_metrics(run / "metrics.jsonl")
    found = []
    if [row["step"] for row in rows] != list(range(1, count + 1)):
        found.append("steps are not recorded once each")
    for row in rows:
        if row["weight_version"] != row["step"] or row["staleness"] != 0:
            found.append(f"step {row['step']}: weights {row['weight_version']}, staleness {row['staleness']}")
        if not (
            row["mismatch/tokens"] > 0 and row["mismatch/mean_abs"] < 1e-4 and row["logprob_gap/max"] < 1e-3
        ):
            found.append(f"step {row['step']}: servers and trainer differ by {row['mismatch/mean_abs']}")
    return found


def check_served(run: Path, count: int) -> None:
    assert wrong_with_served(run, count) == []
