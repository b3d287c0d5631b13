"""Trainer and server in turn on the same machine: a whole run with a real server, beside one whose server stands apart.

On a CPU the server answers every call of memory and frees nothing; what is lent by the trainer is lent.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.pool import RankPool
from tests.sglang.conftest import Servers
from tests.sglang.training_job import run_config, train, train_with_a_server_that_dies_asleep

pytestmark = pytest.mark.sglang
STEPS = 3
ELSEWHERE = re.compile("seconds/|speed/|memory/|mismatch/|logprob_gap/|tokens_per_second|weight_version|time")


def config_of(directory: Path, servers: Servers, together: bool, steps: int = STEPS) -> RunConfig:
    """Greedy completions, so that a server samples the same ones twice; their entropy still has a gradient."""
    directory.mkdir(exist_ok=True)
    sglang: dict[str, Any] = {"weight_transfer": "tensor", "bucket_mb": 1, "verify_every": 1}
    if together:
        sglang |= {"python": servers.launch.python, "args": ["--log-level-http", "info"]}
    else:
        sglang["urls"] = servers.urls[:1]
    rollout = {"top_k": 1, "placement": "together" if together else "apart", "sglang": sglang}
    data = {"path": str(directory / "sums.jsonl"), "system_prompt": "", "max_prompt_tokens": 64}
    return run_config(
        directory,
        servers.checkpoint,
        steps,
        rollout=rollout,
        optimizer={"distributed": True},
        evaluation={"data": data, "every": 1, "max_new_tokens": 8},
    )


def figures(config: RunConfig) -> list[dict[str, Any]]:
    """What does not depend on the machine, nor on what else a server computes at a time."""
    rows = read_metrics(config.path / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not ELSEWHERE.search(name)} for row in rows]


def tokens(config: RunConfig) -> list[list[list[int]]]:
    store = TrajectoryStore(config.path / "trajectories")
    return [[t.token_ids.tolist() for t in store.read(step)] for step in range(STEPS)]


def check_figures(together: RunConfig, apart: RunConfig) -> None:
    assert tokens(together) == tokens(apart)
    found, expected = figures(together), figures(apart)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert any(row.get("grad_norm", 0) > 0 for row in expected)
    assert any("eval/accuracy" in name for row in expected for name in row)
    assert found == expected
    for row in read_metrics(together.path / "metrics.jsonl"):
        assert row.get("mismatch/mean_abs", 0) < 1e-4
        assert row.get("logprob_gap/max", 0) < 1e-3
        assert "loss" not in row or row["seconds/turns"] > 0


def asked(config: RunConfig) -> str:
    """The calls of memory and updates that the server was asked, a letter each; repeated ones once."""
    letters = {
        "/release_memory": "R",
        "/resume_memory": "T",
        "/update_weights_from_tensor": "u",
        "/generate": "g",
    }
    log = (config.path / "logs" / "sglang-0.log").read_text()
    calls = re.findall("|".join(letters), log)
    return re.sub(r"(.)\1+", r"\1", "".join(letters[call] for call in calls))


@pytest.mark.soak
def test_a_run_whose_server_shares_the_ranks_machine_is_that_of_one_apart(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    """On two ranks, stopped after two steps, with its memory lent, and resumed."""
    apart, together = (
        config_of(tmp_path / name, servers, name == "together") for name in ("apart", "together")
    )
    assert ranks.run(2, train, apart) == [0, 0]
    first = config_of(tmp_path / "together", servers, True, STEPS - 1)
    assert ranks.run(2, train, first) == [0, 0]
    assert ranks.run(2, train, together) == [0, 0]
    check_figures(together, apart)
    # a server samples once by itself as it starts; the certificate, the evaluation and the batch; then it makes room, and
    # takes it in two parts
    assert asked(together) == "gug" + "RTuTg" * (STEPS - 1) + "ug" + "RTuTg"


@pytest.mark.rehearsal
def test_a_server_that_dies_asleep_is_back_for_the_next_step(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    apart, together = (
        config_of(tmp_path / name, servers, name == "together") for name in ("apart", "together")
    )
    assert ranks.run(1, train, apart) == [0]
    assert ranks.run(1, train_with_a_server_that_dies_asleep, together, 1) == [0]
    check_figures(together, apart)
    assert "-> down" in (together.path / "logs" / "rank-0.log").read_text()
