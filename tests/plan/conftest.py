"""Runs to be checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n')
    return path


@pytest.fixture
def build(tiny_checkpoint: Callable[[str], Path], rows: Path) -> Callable[..., RunConfig]:
    """A run on a tiny Llama; keyword arguments are sections with the values that differ."""

    def make(model_path: Path | None = None, **sections: dict[str, Any]) -> RunConfig:
        values: dict[str, Any] = {
            "name": "trial",
            "model": {"path": str(model_path or tiny_checkpoint("llama")), "dtype": "fp32"},
            "data": {"path": str(rows), "max_prompt_tokens": 128},
            "training": {"steps": 2},
            "rollout": {"max_new_tokens": 64},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return RunConfig.model_validate(values)

    return make
