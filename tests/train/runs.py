"""What tests read of runs."""

from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

GSM8K = Path(__file__).parents[1] / "fixtures" / "gsm8k_small.jsonl"


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    return read_metrics(config.path / "metrics.jsonl")


def stored(config: RunConfig) -> list[list[Trajectory]]:
    store = TrajectoryStore(config.path / "trajectories")
    return [store.read(step) for step in store.steps()]


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.path / "checkpoints").glob("step-*"))
