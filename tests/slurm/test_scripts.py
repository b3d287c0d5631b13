"""The shell scripts by shellcheck, and submit against a real Slurm's opinion."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.runs import ROOT
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])


def test_shellcheck_finds_nothing(cluster: VirtualSlurm) -> None:
    assert {path.name for path in SCRIPTS} >= {
        "lib.sh",
        "train.sbatch",
        "serve.sbatch",
        "convert.sbatch",
        "evaluate.sbatch",
        "scaling.sbatch",
    }
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (("--nodes", "10"), "Requested node configuration is not available"),
        (("--nodes", "1"), "the world has 1 rank, not a multiple of parallel.tensor"),
        (("--nodes", "2", "--time", "soon"), "Invalid --time specification"),
        (("--nodes", "2", "parallel.tensr=2"), "did you mean parallel.tensor?"),
        (("--nodes", "2", "--spares", "1"), "has turned off (screening_s: 0)"),
    ],
    ids=["too few nodes", "layout", "time", "typo", "spares"],
)
def test_submit_refuses_before_it_queues(
    cluster: VirtualSlurm,
    environment: dict[str, str],
    recipe: Path,
    site: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    command = (sys.executable, "-m", "gtpo_megatron", "submit", recipe, "--site", site, *words)
    done = cluster.run(*command, environment=environment, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert list(recipe.parent.glob("runs/small/submissions/*")) == []


def test_a_dry_run_writes_what_a_person_may_submit(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "gtpo_megatron", "submit", recipe, "--site", site, "--nodes", "2")
    shown = cluster.run(*command, "--dry-run", environment=environment).stdout.splitlines()
    script = tmp_path / "runs" / "small" / "submissions" / "1" / "train.sbatch"
    assert shown[-1] == f"sbatch --parsable {script}"
    assert cluster.run("squeue", "--noheader").stdout == ""
    cluster.run("sbatch", "--test-only", script)
