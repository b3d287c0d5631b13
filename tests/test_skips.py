"""In continuous integration a part that is missing is a failure, not a skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("import pytest\ndef test(): pytest.skip('missing')", False),
        ("import pytest\n@pytest.fixture\ndef part(): pytest.skip('missing')\ndef test(part): pass", False),
        ("import pytest\npytest.importorskip('no_such_module')", False),
        ("import pytest\n@pytest.mark.gpu\ndef test(): pytest.skip('missing')", True),
    ],
    ids=["test", "fixture", "module", "gpu"],
)
@pytest.mark.parametrize("ci", ["true", "false"])
def test_only_a_gpu_may_be_missing_in_ci(text: str, allowed: bool, ci: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.conftest",
            "-c",
            REPOSITORY / "pyproject.toml",
            tmp_path,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    good = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert (done.returncode in good) == (allowed or ci == "false"), done.stdout
    assert "missing" in done.stdout or "1 skipped" in done.stdout or "no_such_module" in done.stdout
