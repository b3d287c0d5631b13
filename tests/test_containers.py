"""The container files install every pin but what the image brings, from where the repository has it."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "containers" / "Dockerfile", ROOT / "containers" / "gtpo-megatron.def")


def test_all_pins_are_installed_but_the_images_torch() -> None:
    listed = subprocess.run(
        [ROOT / "containers" / "install.sh", "--pins"],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    lines = [
        line.split("#")[0].strip()
        for name in ("build", "trainer", "trainer-nodeps")
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    ]
    pins = [Requirement(line) for line in lines if line]
    expected = {f"{pin.name}{pin.specifier}" for pin in pins if pin.marker is None or pin.marker.evaluate()}
    found = {f"{Requirement(line).name}{Requirement(line).specifier}" for line in listed if line}
    assert {pin.split("==")[0] for pin in expected - found} == {"torch"}
    assert found < expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_container_file_runs_the_script(file: Path) -> None:
    text = file.read_text()
    folder = "/opt/gtpo_megatron"
    assert f". {folder}" in text  # what it copies, and where to
    assert f"{folder}/containers/install.sh" in text
    bases = {
        word for line in text.splitlines() for word in line.replace("=", " ").split() if "pytorch:" in word
    }
    assert "nvcr.io/nvidia/pytorch:25.08-py3" in bases
