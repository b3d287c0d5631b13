"""A rank that does not get on ends, with its stacks; one that does, or waits where it may, is left alone."""

import subprocess
import sys
import time

import pytest

from gtpo_megatron import vigil
from gtpo_megatron.errors import STUCK

PROGRAM = """\
import sys, time
from gtpo_megatron import vigil
vigil.watch(float(sys.argv[1]), poll_s=0.02)
def waits_for_others():
    until = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < until:
        time.sleep(0.02)
        if sys.argv[4] == "on":
            vigil.progress()
vigil.stage(sys.argv[2])
waits_for_others()
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_rank_that_waits_in_vain_ends_with_its_stacks() -> None:
    done = run("0.1", "training", "50", "stuck")
    assert done.returncode == STUCK
    assert "in waits_for_others" in done.stderr
    assert "rank 0: no progress in stage training for 0 s" in done.stderr.splitlines()[-1]
    assert "training.stuck_after_s: 0.1" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "limit_s, stage, how",
    [("2", "training", "on"), ("0.1", "rollout", "stuck"), ("0", "training", "stuck")],
    ids=["gets on", "waits for prompts", "off"],
)
def test_others_are_left_alone(limit_s: str, stage: str, how: str) -> None:
    done = run(limit_s, stage, "3" if how == "on" else "0.5", how)
    assert (done.returncode, done.stderr) == (0, "")


def test_silence_is_counted_from_the_last_sign() -> None:
    vigil.stage("training")
    time.sleep(0.3)
    silent = vigil.silent_s()
    assert silent >= 0.3
    vigil.progress()
    assert vigil.silent_s() < silent
    vigil.stage("")
    assert vigil.silent_s() == 0.0
