"""Three faults in one run; tools/slurm_chaos.py does as many as one likes."""

import subprocess
import sys

import pytest

from tests.slurm.runs import ROOT
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm


@pytest.mark.soak
def test_a_run_with_three_faults_gives_the_metrics_of_one_that_is_left_alone(cluster: VirtualSlurm) -> None:
    # it has a cluster of its own; the fixture tells whether there can be one
    command = [sys.executable, "tools/slurm_chaos.py", "--faults", "3", "--seed", "4"]
    command += ["--server-faults", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults: 1 requeued, 1 rank stopped, 1 power cut" in done.stdout
    assert "0 differ" in done.stdout and "; 0 violations" in done.stdout
