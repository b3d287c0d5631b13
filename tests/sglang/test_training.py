"""Training with rollouts from real servers: layouts and ways of weights, one step off policy, and no server left."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.weights.verify import differing_tensors
from gtpo_megatron.run.metrics import read_metrics
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.pool import RankPool
from tests.sglang.conftest import Servers, run_servers
from tests.sglang.proxy import FaultyProxy
from tests.sglang.training_job import (
    run_config,
    train,
    train_beside_rollout,
    train_with_a_transfer_that_garbles,
)
from tests.tiny_models import make_tiny_checkpoint

pytestmark = pytest.mark.sglang


def served_version(url: str, checkpoint: Path) -> int:
    """The version of the weights that a server holds, which must be exactly those of the checkpoint."""

    async def ask() -> str:
        client = Client(None, 60.0)
        try:
            tag = (await client.info(url)).weight_version
            assert not await differing_tensors(client, url, str(checkpoint), tag, 60.0, 60.0)
            return tag
        finally:
            await client.close()

    return int(asyncio.run(ask()).rsplit(":", 1)[1])


def check_on_policy(config: RunConfig, servers: Servers) -> None:
    """Servers and trainer agree at every step, and the servers hold in the end what the run exports."""
    rows = read_metrics(config.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config.training.steps + 1))
    for row in rows:
        assert row["weight_version"] == row["step"]
        assert row["staleness"] == 0
        assert row["grad_norm"] > 0
        assert row["mismatch/tokens"] > 0
        assert row["mismatch/mean_abs"] < 1e-4
        assert row["logprob_gap/max"] < 1e-3
    for url in servers.urls:
        assert served_version(url, config.path / "hf") == config.training.steps


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["all-weights", "lora"])
def test_training_in_one_process(
    lora: dict[str, int] | None, ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    """Of adapters the servers get the merged weights."""
    sglang = {"urls": servers.urls, "verify_every": 1}
    config = run_config(tmp_path, servers.checkpoint, 2, model={"lora": lora}, rollout={"sglang": sglang})
    assert ranks.run(1, train, config) == [0]
    check_on_policy(config, servers)


@pytest.mark.parametrize("method", ["distributed", "tensor", "disk"])
def test_weights_of_a_trainer_at_tp2_pp2_reach_the_servers(
    ranks: RankPool, servers: Servers, tmp_path: Path, method: str
) -> None:
    sglang = {"urls": servers.urls, "verify_every": 1, "weight_transfer": method, "bucket_mb": 1}
    config = run_config(
        tmp_path,
        servers.checkpoint,
        2,
        rollout={"sglang": sglang},
        parallel={"tensor": 2, "pipeline": 2},
    )
    assert ranks.run(4, train, config) == [0] * 4
    check_on_policy(config, servers)


@pytest.fixture(scope="module")
def server_of_experts(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A server of a mixture of experts."""
    directory = tmp_path_factory.mktemp("experts")
    checkpoint = make_tiny_checkpoint(directory, "qwen3_moe")
    with run_servers(sglang_python, checkpoint, directory / "logs") as servers:
        servers.wait()
        yield servers


@pytest.mark.soak
def test_weights_of_experts_on_two_ranks_reach_the_server(
    ranks: RankPool, server_of_experts: Servers, tmp_path: Path
) -> None:
    config = run_config(
        tmp_path,
        server_of_experts.checkpoint,
        2,
        rollout={"sglang": {"urls": server_of_experts.urls, "verify_every": 1}},
        parallel={"expert": 2},
    )
    assert ranks.run(2, train, config) == [0] * 2
    check_on_policy(config, server_of_experts)


def test_one_step_off_policy(ranks: RankPool, servers: Servers, tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        servers.checkpoint,
        4,
        rollout={"sglang": {"urls": servers.urls}, "staleness": 1},
        algorithm={"importance": {"level": "token", "cap": 2.0}},
    )
    assert ranks.run(1, train_beside_rollout, config) == [0]
    rows = read_metrics(config.path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    # the policy moved between sampling and training, which is what the importance weights correct
    assert rows[0]["logprob_gap/max"] < 1e-3 < min(row["logprob_gap/max"] for row in rows[1:])
    assert all(0 <= row["importance/truncated_share"] <= 1 for row in rows)
    store = TrajectoryStore(config.path / "trajectories")
    for step in range(4):
        versions = np.concatenate([t.token_versions for t in store.read(step)])
        assert set(versions.tolist()) == {max(step - 1, 0)}


def partial_config(
    directory: Path, servers: Servers, sglang: dict[str, Any] | None = None, **rollout: Any
) -> RunConfig:
    """Four steps whose completions may go on with newer weights than they began with."""
    return run_config(
        directory,
        servers.checkpoint,
        4,
        rollout=rollout | {"sglang": {"urls": servers.urls, "partial": True} | (sglang or {})},
        training={"micro_batch_tokens": 4096},
        algorithm={"importance": {"level": "token", "cap": 2.0}},
    )


@pytest.mark.soak
def test_an_update_does_not_wait_for_completions_that_go_on_with_it(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    # seconds of sampling, where a step of training takes less than one
    config = partial_config(tmp_path, servers, staleness=1, max_new_tokens=600)
    assert ranks.run(1, train, config) == [0]
    rows = read_metrics(config.path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["response/continued"] == 0
    assert max(row["response/continued"] for row in rows[1:]) > 0
    store = TrajectoryStore(config.path / "trajectories")
    for step in range(1, 4):
        for trajectory in store.read(step):
            assert set(trajectory.token_versions.tolist()) <= {step - 1, step}
            assert (np.diff(trajectory.token_versions) >= 0).all()


def test_groups_that_oversampling_left_go_on_in_the_next_batch(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    # places for two of the four groups: the others begin as completions of these end
    config = partial_config(tmp_path, servers, {"concurrency": 4}, oversample=2.0, max_new_tokens=300)
    assert ranks.run(1, train, config) == [0]
    store = TrajectoryStore(config.path / "trajectories")
    batches = [store.read(step) for step in range(4)]
    prompts = [t.prompt_id for batch in batches for t in batch if t.index == 0]
    assert len(prompts) == len(set(prompts)) == 8
    for step, batch in enumerate(batches):
        assert max(t.token_versions.max() for t in batch) <= step
    log = (config.path / "logs" / "rank-0.log").read_text()
    assert "step 1: 2 of 4 groups were not finished; put back" in log
    # what was begun with older weights went on with newer ones
    assert any(len(set(t.token_versions.tolist())) > 1 for batch in batches for t in batch)


def test_garbled_weights_stop_the_run_with_a_checkpoint_and_the_names_of_the_tensors(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    sglang = {"urls": servers.urls, "verify_every": 1}
    config = run_config(tmp_path, servers.checkpoint, 4, rollout={"sglang": sglang})
    (message,) = ranks.run(1, train_with_a_transfer_that_garbles, config, 3)  # after the second step
    assert "the weights of 2 servers are not the trainer's" in message
    for url in servers.urls:
        assert f"{url}: " in message
    assert "tensors differ: model." in message
    assert len(read_metrics(config.path / "metrics.jsonl")) == 2
    assert (config.path / "checkpoints" / "step-000002" / "manifest.json").exists()
    assert ranks.run(1, train, config) == [0]
    check_on_policy(config, servers)


def test_one_wrong_bit_at_the_start_stops_the_run_before_it_samples(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    config = run_config(tmp_path, servers.checkpoint, 1, rollout={"sglang": {"urls": servers.urls}})
    (message,) = ranks.run(1, train_with_a_transfer_that_garbles, config, 1, True)
    assert "the weights of 2 servers are not the trainer's" in message
    assert "tensors differ: model." in message
    assert not list((config.path / "trajectories").glob("*"))
    elsewhere = tmp_path / "unchecked"
    elsewhere.mkdir()
    sglang = {"urls": servers.urls, "checksums": "never"}
    unchecked = run_config(elsewhere, servers.checkpoint, 1, rollout={"sglang": sglang})
    assert ranks.run(1, train_with_a_transfer_that_garbles, unchecked, 1, True) == [0]


@pytest.mark.parametrize("staleness, cut", [(0, "/"), (1, "/begin_weight_update")])
def test_without_servers_the_run_saves_and_stops_and_goes_on_when_they_are_back(
    ranks: RankPool, servers: Servers, proxy: FaultyProxy, tmp_path: Path, staleness: int, cut: str
) -> None:
    steps = 4
    sglang = {"urls": [proxy.url], "no_server_timeout_s": 4.0, "start_timeout_s": 60.0}
    config = run_config(
        tmp_path, servers.checkpoint, steps, rollout={"sglang": sglang, "staleness": staleness}
    )
    metrics = config.path / "metrics.jsonl"

    def cut_after_first_step() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.02)
        proxy.faults = {cut: "cut"}

    threading.Thread(target=cut_after_first_step, daemon=True).start()
    (message,) = ranks.run(1, train, config)
    assert "no SGLang server has been usable for 4 s" in message
    assert proxy.url in message
    done = len(read_metrics(metrics))
    assert 1 <= done < steps
    assert (config.path / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    proxy.faults = {}
    assert ranks.run(1, train, config) == [0]
    rows = read_metrics(metrics)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["weight_version"] for row in rows] == list(range(1, steps + 1))
    if not staleness:
        assert max(row["logprob_gap/max"] for row in rows) < 1e-3
    store = TrajectoryStore(config.path / "trajectories")
    prompts = [{t.prompt_id for t in store.read(step)} for step in range(steps)]
    assert len(set.union(*prompts)) == 2 * steps  # none lost, none sampled twice
