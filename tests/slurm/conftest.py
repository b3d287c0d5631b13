"""One virtual cluster for all tests here, and small runs for it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtpo_megatron.cluster.record import job_ids
from tests.sglang.conftest import sglang_python as sglang_python  # the fixture
from tests.slurm.runs import TRAIN, user_environment
from tests.slurm.virtual import CannotRun, VirtualSlurm, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    """Four nodes that are up. Where that is impossible the tests are skipped (a failure where CI=true, as any skip)."""
    try:
        install()
        slurm = VirtualSlurm(tmp_path_factory.mktemp("slurm"))
        slurm.__enter__()
    except CannotRun as reason:
        pytest.skip(str(reason))
    try:
        yield slurm
    finally:
        slurm.__exit__()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return user_environment()


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A small GTPO run, two ranks at tensor 2; its paths are absolute."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"question": "{n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(16)))
    values: dict[str, Any] = {
        "name": "small",
        "dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_checkpoint("llama")), "dtype": "fp32"},
        "data": {"path": str(prompts), "system_prompt": "", "max_prompt_tokens": 120},
        "parallel": {"tensor": 2},
        "training": {"steps": 12, "micro_batch_tokens": 256},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "rewards": {
            "workers": 1,
            "timeout_s": 600,  # a batch that is held is scored all the same
            "terms": [
                {
                    "kind": "python",
                    "name": "characters",
                    "function": "tests.training_rewards:different_characters_when_let_go",
                    "options": {"hold": str(tmp_path / "hold")},
                }
            ],
        },
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": "off"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The virtual cluster's facts: nodes without GPUs, two ranks fit on one, gloo on eth0; no screening, for haste."""
    facts = {
        "partition": "batch",
        "time": "00:30:00",
        "gpus_per_node": 0,
        "ranks_per_node": 1,
        "sbatch": ["--mem=1000"],
        "python": sys.executable,
        "interface": "eth0",
        "screening_s": 0,
    }
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(facts))
    return path


@pytest.fixture
def submit(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> Callable[..., str]:
    """Submit the recipe by the command line, on two nodes, under a name: the job's number."""

    def call(name: str, *words: str) -> str:
        command = (*TRAIN, "submit", recipe, "--site", site, "--nodes", "2", f"name={name}", *words)
        cluster.run(*command, environment=environment)
        return job_ids(recipe.parent / "runs" / name)[-1]

    return call
