"""What requirements/cluster.txt compiles without isolation finds what it builds with in the environment."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# as Transformer Engine's extension and flash-attn begin: setuptools alone has no module of that name
SETUP = """\
from setuptools import setup
from wheel.bdist_wheel import bdist_wheel

setup(name="compiled", version="1", py_modules=["compiled"], cmdclass={"bdist_wheel": bdist_wheel})
"""


def test_a_source_package_that_imports_wheel_is_built_without_isolation(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "compiled.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    built = subprocess.run(
        [*command, "--wheel-dir", tmp_path / "out", tmp_path], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compiled-1-py3-none-any.whl"]


def test_what_it_builds_with_is_pinned_and_installed() -> None:
    lines = (ROOT / "requirements" / "build.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {pin.name for pin in pins} == {"setuptools", "wheel"}
    for pin in pins:
        assert metadata.version(pin.name) in pin.specifier
