"""The same recipe in a container, by stand-ins for what clusters have: they note what they are asked, and run the rest."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.runs import change, ended, last_line
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
STAND_IN = """\
#!/bin/bash
echo "$*" >>{note}
{take}
"""
STAND_INS = {
    "pyxis": (
        "srun",
        'words=(); for word; do case $word in --container-*) ;; *) words+=("$word") ;; esac; done\n'
        'exec /usr/bin/srun "${words[@]}"',
    ),
    "apptainer": (
        "apptainer",
        '[ $1 = exec ] && [ $2 = --bind ] && [ $4 = --pwd ] || exit 2\ncd "$5"; exec "${@:7}"',
    ),
}


@pytest.mark.parametrize("kind", [pytest.param("pyxis", marks=pytest.mark.soak), "apptainer"])
def test_ranks_are_started_in_a_container(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str], kind: str
) -> None:
    folder = recipe.parent
    image = folder / "image"
    image.touch()
    programs = folder / "programs"
    programs.mkdir()
    name, take = STAND_INS[kind]
    (programs / name).write_text(STAND_IN.format(note=folder / "asked", take=take))
    (programs / name).chmod(0o755)
    path = f"{programs}:/usr/bin:/bin"
    container = {"kind": kind, "image": str(image), "mounts": [str(folder), str(Path.cwd())]}
    change(site, container=container, env={"PATH": path}, python=sys.executable)
    run = folder / "runs" / "small"
    job_id = submit("small", "training.steps=1", "optimizer.warmup_steps=0")
    job = cluster.wait_for_job(job_id)
    assert job["JobState"] == "COMPLETED", last_line(run, job_id)
    assert [how for *_, how in ended(run)] == ["0"]
    asked = (folder / "asked").read_text()
    mounts = f"{folder}:{folder},{Path.cwd()}:{Path.cwd()}" if kind == "pyxis" else f"{folder},{Path.cwd()}"
    for word in (str(image), mounts, str(Path.cwd())):
        assert word in asked
    assert asked.count(str(image)) == (1 if kind == "pyxis" else 2)  # by srun; by each rank
