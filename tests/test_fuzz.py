"""The short form of `make fuzz`: hostile completions, rows, configurations and run directories are treated as they should be."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
@pytest.mark.parametrize("seed", ["1", "2"])
def test_hostile_input_is_treated_as_it_should_be(seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "tools/fuzz.py", "--count", "60", "--seed", seed],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for table in ("completions", "rows", "configurations", "directories"):
        assert f"{table}: 60 tried, 0 treated otherwise" in done.stdout
