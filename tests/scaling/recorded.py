"""Directories as runs leave them, small: the facts, the configuration, metrics, lengths of completions."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import save_config
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.run.facts import RunFacts

MODEL = Path(__file__).parents[1] / "fixtures" / "configs" / "Llama-3.1-8B-Instruct"
H100 = "NVIDIA H100 80GB HBM3"
LENGTHS = [200 + 37 * i % 900 for i in range(64)]


def recipe(folder: Path, name: str, **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": name,
        "dir": str(folder),
        "model": {"path": str(MODEL), "dtype": "bf16"},
        "data": {"path": "rows.jsonl", "max_prompt_tokens": 400},
        "training": {"steps": 6, "micro_batch_tokens": 8192},
        "rollout": {"engine": "sglang", "prompts_per_step": 64, "group_size": 8, "max_new_tokens": 2000},
    }
    merged = {key: {**values.get(key, {}), **value} for key, value in sections.items()}
    return RunConfig.model_validate(values | merged)


def row(step: int, ranks: int, **values: float) -> dict[str, Any]:
    """A step's metrics; `values` with `__` for `/` overlay them."""
    usual = {
        "tokens": 1e6,
        "model_flop": 4e16,
        "world_size": ranks,
        "response/length_mean": sum(LENGTHS) / len(LENGTHS),
        "seconds/rollout": 40.0,
        "seconds/training": 80.0 / ranks,
        "seconds/weights": 2.0,
        "speed/sampling_tokens_per_second": 8000.0,
        "speed/weights_gb_per_second": 8.0,
        "memory/peak_gib": 60.0,
    }
    return {"step": step, "time": 0.0} | usual | {key.replace("__", "/"): v for key, v in values.items()}


def write_run(
    config: RunConfig, ranks: int, rows: list[dict[str, Any]], device: str = H100, per_node: int = 8
) -> Path:
    """The directory of a run that is done."""
    save_config(config, config.path / "config.yaml")
    facts = RunFacts(ranks, per_node, config.parallel.model_dump(), device, read_shape(str(MODEL)))
    facts.write(config.path)
    text = "".join(f"{json.dumps(line)}\n" for line in rows)
    (config.path / "metrics.jsonl").write_text(text)
    (config.path / "trajectories").mkdir()
    table = pa.table({"token_ids": [list(range(length)) for length in LENGTHS]})
    parquet.write_table(table, config.path / "trajectories" / "step-00000000.parquet")
    return config.path
