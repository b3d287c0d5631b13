"""The paper's recipes, the very files, submitted to four nodes at toy size: SFT, GRPO with its KL term and GTPO, once each."""

import json
import math
from pathlib import Path

import pytest

from gtpo_megatron.cluster.record import job_ids
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import COMPLETE
from gtpo_megatron.run.directory import read_status
from gtpo_megatron.run.facts import read_facts
from gtpo_megatron.run.metrics import read_metrics
from tests.paper_recipes import STEPS, paper_files, write_toy_overlay
from tests.slurm.runs import TRAIN
from tests.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.sglang]
NODES = 4  # one rank each
RUN_S = 600.0  # with a server that starts on the first node, on a busy machine


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay: the recipes' layouts and engines stay."""
    return write_toy_overlay(
        tmp_path_factory.mktemp("toy"), logging={"tensorboard": False, "progress": "off"}
    )


@pytest.mark.parametrize(
    ("names", "tensor"),
    [
        pytest.param(["llama-3.1-8b-bf16", "math", "sft"], 4, id="sft", marks=pytest.mark.rehearsal),
        pytest.param(["qwen2.5-3b-bf16", "grpo-kl"], 2, id="grpo", marks=pytest.mark.rehearsal),
        pytest.param(["llama-3.1-8b-bf16"], 4, id="gtpo", marks=pytest.mark.soak),
    ],
)
def test_a_run_of_the_paper_trains_on_four_nodes(
    cluster: VirtualSlurm,
    environment: dict[str, str],
    site: Path,
    toy: Path,
    sglang_python: str,
    names: list[str],
    tensor: int,
) -> None:
    files = [*paper_files(*names), toy]
    server = (f"rollout.sglang.python={sglang_python}", "rollout.sglang.verify_every=1")
    config = load_config(files)
    words = () if config.rollout.engine == "embedded" else server
    command = (*TRAIN, "submit", *files, *words, "--site", site, "--nodes", str(NODES))
    cluster.run(*command, environment=environment)
    (job_id,) = job_ids(config.path)
    job = cluster.wait_for_job(job_id, RUN_S)
    log = (config.path / f"slurm-{job_id}.log").read_text()
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "0", str(NODES)), log[-3000:]
    assert read_status(config.path).exit_code == COMPLETE

    facts = read_facts(config.path)
    assert (facts.world_size, facts.ranks_per_node, facts.parallel["tensor"]) == (NODES, 1, tensor)
    rows = read_metrics(config.path / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in trained)
    if "grpo-kl" not in names:  # which has no gradient while all rewards are 0; GTPO has its entropy term
        assert all(row["grad_norm"] > 0 for row in trained)
    assert {"eval/accuracy"} <= set().union(*rows)
    if config.rollout.engine == "sglang":  # a server samples with the weights of each step
        for row in trained:
            assert row["weight_version"] == row["step"]
            assert row["mismatch/tokens"] > 0 and row["mismatch/mean_abs"] < 1e-4
            assert row["logprob_gap/max"] < 1e-3
    assert ("kl/mean" in trained[0]) == ("grpo-kl" in names)
    exported = json.loads((config.path / "hf" / "config.json").read_text())
    assert exported["num_hidden_layers"] == 4


def test_the_recipes_are_the_papers_but_for_size(toy: Path) -> None:
    """What the overlay swaps: nothing of the algorithm, the rewards, the sampling or the optimizer but its warm-up."""
    files = paper_files("llama-3.1-8b-bf16")
    recipe, small = load_config(files), load_config([*files, toy])
    for section in ("algorithm", "rewards", "parallel"):
        assert getattr(recipe, section) == getattr(small, section)
    assert recipe.optimizer.model_copy(update={"warmup_steps": 1}) == small.optimizer
    assert (recipe.rollout.engine, recipe.rollout.group_size) == (
        small.rollout.engine,
        small.rollout.group_size,
    )
