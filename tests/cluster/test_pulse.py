"""A rank's sign of life: renewed while it lives, gone when it ends in order, left when it is killed; stacks at SIGUSR2."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

PROGRAM = """\
import os, sys
from gtpo_megatron.cluster.pulse import give_pulse
give_pulse(os.environ, beat_s=0.05)
def waits_for_a_word():
    return sys.stdin.readline()
waits_for_a_word()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    environ = os.environ | {"GTPO_PULSE": str(tmp_path), "RANK": "3", "SLURMD_NODENAME": "node2"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environ, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until((tmp_path / "3.node2").exists)
    yield process
    process.kill()
    process.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def renewed(file: Path) -> bool:
    seen = file.stat().st_mtime_ns
    deadline = time.monotonic() + 2
    while file.stat().st_mtime_ns == seen:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def line_of(stream: IO[str], text: str) -> str:
    return next(line for line in stream if text in line)


def test_a_rank_that_is_stopped_gives_no_sign_and_one_that_ends_takes_it_back(
    rank: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert renewed(tmp_path / "3.node2")
    rank.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert not renewed(tmp_path / "3.node2")
    rank.send_signal(signal.SIGCONT)
    assert renewed(tmp_path / "3.node2")
    rank.stdin.write("go on\n")
    rank.stdin.flush()
    assert rank.wait(60) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_rank_says_where_it_is_and_goes_on(rank: subprocess.Popen[str], tmp_path: Path) -> None:
    rank.send_signal(signal.SIGUSR2)
    assert line_of(rank.stderr, "waits_for_a_word").strip().startswith("File")
    assert renewed(tmp_path / "3.node2")
    rank.kill()
    rank.wait()
    assert (tmp_path / "3.node2").exists()  # whoever was killed cannot take it back


def test_without_a_folder_nothing_is_done(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        "sys.stdin.readline()", "print(sorted(t.name for t in __import__('threading').enumerate()))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GTPO_PULSE"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['MainThread']\n"
