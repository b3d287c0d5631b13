"""Small runs of a file of tests, in one directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from tests.training_jobs import small_run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make(directory: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """Configurations of runs in one directory, on GSM8K's format or on sums."""
    sums = directory / "sums.jsonl"
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(5)]
    sums.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def configure(name: str, **sections: Any) -> RunConfig:
        return small_run(directory, name, tiny_checkpoint("qwen3"), sums, **sections)

    return configure
