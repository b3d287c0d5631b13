"""The commands of README's section on Slurm, in its order, from the project's folder, on the virtual cluster."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.slurm.runs import ROOT, steps
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
SMALL = ("optimizer.warmup_steps=0", "training.steps=1")
OF_THIS_CLUSTER = (  # a smaller one, without GPUs
    (r"--nodes 16", "--nodes 2"),
    (r"--servers(-job)? 4", r"--servers\1 1"),
    (r"--scaling 1,2,4,8", "--scaling 2,4"),
    (
        r"--ntasks-per-node=8 --gpus-per-node=8",
        "--ntasks-per-node=1 --mem=1000 --export=ALL,GLOO_SOCKET_IFNAME=eth0",
    ),
    (r"training\.steps=500", ""),
)


def commands() -> list[str]:
    """Without their comments."""
    section = (ROOT / "README.md").read_text().partition("On a Slurm cluster, from a login node")[2]
    block = section.partition("```sh\n")[2].partition("```")[0]
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


def test_the_section_is_followed_line_by_line(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    axes = {"lr": {"low": ["optimizer.lr=1e-3"], "high": ["optimizer.lr=1e-2"]}}
    sweep.write_text(yaml.safe_dump({"name": "rate", "recipe": recipe.name, "axes": axes}))
    runs = tmp_path / "runs"
    names = {
        "RECIPE.yaml": str(recipe),
        "SWEEP.yaml": str(sweep),
        "pyxis": str(site),
        "RUN_DIR": str(runs / "small"),
    }
    environ = environment | {"PATH": f"{ROOT / '.venv' / 'bin'}:{environment['PATH']}"}
    seen = set()
    for line in commands():
        for pattern, here in OF_THIS_CLUSTER:
            line = re.sub(pattern, here, line)
        words = [names.get(word, word) for word in shlex.split(line)]
        if words[0] == "sbatch":
            words[1:1] = [f"--output={tmp_path}/by-hand.log"]
            words += ["name=by-hand", *SMALL]
            words[words.index(str(runs / "small"))] = str(runs / "by-hand")
        elif words[1] == "submit":
            words += [] if "--sweep" in words else ["name=small", *SMALL, "rollout.prompts_per_step=4"]
            if "--servers" in words or "--servers-job" in words:
                words.append("rollout.engine=sglang")
            words += [] if "--dry-run" in words else ["--dry-run"]
        shown = cluster.run(*words, environment=environ, cwd=ROOT).stdout
        seen.add(words[0] if words[0] == "sbatch" else words[1])
        if words[1] == "submit":
            assert "sbatch" in shown or "scaling-report" in shown, (line, shown)
        elif words[1] == "status":
            assert str(runs / "small") in shown
        else:
            job_id = shown.split()[-1]
            job = cluster.wait_for_job(job_id)
            log = (tmp_path / "by-hand.log").read_text()
            assert job["JobState"] == "COMPLETED", log
            assert log.splitlines()[-1].endswith("END complete at step 1")
            assert steps(runs / "by-hand") == [1]
    assert seen == {"submit", "status", "sbatch"}
