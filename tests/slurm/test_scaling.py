"""A scaling study on a real Slurm: a job for each number of nodes, and one that writes the report of them."""

from pathlib import Path

import pytest

from tests.slurm.runs import TRAIN, last_line
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm


@pytest.mark.soak
def test_a_study_ends_with_its_report(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> None:
    words = ("--scaling", "1,2", "parallel.tensor=1", "training.steps=4")
    said = cluster.run(*TRAIN, "submit", recipe, "--site", site, *words, environment=environment).stdout
    runs = recipe.parent / "runs"
    (report,) = [line.split()[1].rstrip(",") for line in said.splitlines() if "behind them" in line]
    assert cluster.wait_for_job(report)["JobState"] == "COMPLETED"
    page = (runs / "scaling.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
    assert [" 1 ", " 1 "] in rows and [" 2 ", " 2 "] in rows  # ranks, nodes
    log = runs / "small-strong-1" / "reporting" / "1" / "rank-0.log"
    assert last_line(runs / "small-strong-1", report).endswith(f"END complete: the report is in {log}")
    assert "strong scaling" in log.read_text()
