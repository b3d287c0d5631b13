"""A few faults, the trainer's own end among them, in one run; tools/soak.py does as many as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.sglang
@pytest.mark.soak
def test_nothing_is_lost_when_servers_router_and_trainer_are_killed(sglang_python: str) -> None:
    done = subprocess.run(
        [sys.executable, "tools/soak.py", "--faults", "4", "--seed", "16", "--staleness", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 violations" in done.stdout
