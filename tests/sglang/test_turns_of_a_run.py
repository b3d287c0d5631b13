"""Whole runs in which trainer and servers take turns, with servers that have a memory and no model (memory_server.py)."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import COMPLETE, STOPPED
from gtpo_megatron.run.metrics import read_metrics
from tests.parallel.pool import RankPool
from tests.sglang import memory_server
from tests.sglang.training_job import (
    run_config,
    train,
    train_stopped_in,
    train_with_a_server_that_dies_asleep,
)

STEPS = 3
ELSEWHERE = re.compile("seconds/|speed/|memory/|tokens_per_second|time")
LETTERS = {
    "/release_memory_occupation ['kv_cache', 'weights']": "R",
    "/resume_memory_occupation ['weights']": "W",
    "/resume_memory_occupation ['kv_cache']": "K",
    "/update_weights_from_tensor": "u",
    "/generate": "g",
}


@pytest.fixture
def config_of(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run with two such servers, apart or together."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {memory_server.__file__} "$@"\n')
    python.chmod(0o755)

    def make(placement: str, steps: int = STEPS) -> RunConfig:
        directory = tmp_path / placement
        directory.mkdir(exist_ok=True)
        # the servers' logprobs are no model's, nor are their checksums
        sglang = {"checksums": "never", "verify_every": 1, "max_logprob_gap": 100}
        sglang |= {"python": str(python), "servers": 2, "weight_transfer": "tensor", "bucket_mb": 1}
        data = {"path": str(directory / "sums.jsonl"), "system_prompt": "", "max_prompt_tokens": 64}
        return run_config(
            directory,
            tiny_checkpoint("qwen2"),
            steps,
            rollout={"placement": placement, "sglang": sglang},
            optimizer={"distributed": True},
            evaluation={"data": data, "every": 1},
        )

    return make


def figures(config: RunConfig) -> list[dict[str, Any]]:
    rows = read_metrics(config.path / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not ELSEWHERE.search(name)} for row in rows]


def asked(config: RunConfig, server: int) -> str:
    """What a server was asked that has to do with memory, a letter each; repeated ones once."""
    log = (config.path / "logs" / f"sglang-{server}.log").read_text()
    assert "misused" not in log
    calls = re.findall("|".join(map(re.escape, LETTERS)), log)
    return re.sub(r"(.)\1+", r"\1", "".join(LETTERS[call] for call in calls))


def check_equal(together: RunConfig, apart: RunConfig) -> None:
    found, expected = figures(together), figures(apart)
    steps = [row for row in expected if "loss" in row]
    assert len(steps) == STEPS and all(row["grad_norm"] > 0 for row in steps)
    assert any("eval/accuracy" in row for row in expected)
    assert found == expected


@pytest.mark.soak
def test_figures_are_those_of_a_run_apart_also_when_it_is_resumed(
    ranks: RankPool, config_of: Callable[..., RunConfig]
) -> None:
    apart, together = config_of("apart"), config_of("together")
    assert ranks.run(2, train, apart) == [0, 0]
    assert ranks.run(2, train, config_of("together", STEPS - 1)) == [0, 0]  # saves while memory is lent
    assert ranks.run(2, train, together) == [0, 0]
    check_equal(together, apart)
    for row in read_metrics(together.path / "metrics.jsonl"):
        assert "loss" not in row or row["seconds/turns"] > 0
    first, resumed = "ug" + (STEPS - 1) * "RWuKg", "ug" + "RWuKg"
    for server in range(2):
        assert asked(together, server) == first + resumed
        assert asked(apart, server) == "ug" + STEPS * "ug"


@pytest.mark.soak
def test_a_server_that_dies_asleep_costs_no_figure(
    ranks: RankPool, config_of: Callable[..., RunConfig]
) -> None:
    apart, together = config_of("apart"), config_of("together")
    assert ranks.run(1, train, apart) == [0]
    assert ranks.run(1, train_with_a_server_that_dies_asleep, together, 1) == [0]
    check_equal(together, apart)
    assert "-> down" in (together.path / "logs" / "rank-0.log").read_text()
    # started again with all of its memory: if it is back before the run ends (the other is a quorum), its first call is weights,
    # and no part of its memory is resumed
    before, calls = "ugRWuKgR", asked(together, 0)
    assert calls.startswith(before) and calls[len(before) :][:1] in ("", "u")
    assert asked(together, 1) == "ug" + STEPS * "RWuKg"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("turn", "count", "rank"), [("training", 2, 0), ("weights", 2, 1), ("sampling", 2, 0)]
)
def test_a_run_that_is_stopped_within_a_turn_goes_on_as_if_it_was_not(
    ranks: RankPool, config_of: Callable[..., RunConfig], turn: str, count: int, rank: int
) -> None:
    apart, together = config_of("apart"), config_of("together")
    assert ranks.run(2, train, apart) == [COMPLETE] * 2
    assert ranks.run(2, train_stopped_in, together, turn, count, rank) == [STOPPED] * 2
    done = max(row["step"] for row in read_metrics(together.path / "metrics.jsonl"))
    assert 0 < done < STEPS
    assert ranks.run(2, train, together) == [COMPLETE] * 2
    check_equal(together, apart)
    assert all(asked(together, server).endswith("g") for server in range(2))  # misused by nobody
