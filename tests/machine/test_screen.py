"""The screening of a node: each check, what it says, and that it always says something."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from gtpo_megatron.errors import STOPPED
from gtpo_megatron.machine import screen
from gtpo_megatron.machine.screen import Unfit

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".token").write_text("7.1\n")
    return tmp_path


def start(*words: str | Path, node: str = "node7") -> subprocess.Popen[str]:
    environ = os.environ | {"SLURMD_NODENAME": node, "SLURM_GPUS_ON_NODE": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "gtpo_megatron.machine.screen", *map(str, words)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """How and why, of the one line."""
    (line,) = process.communicate(timeout=120)[0].splitlines()
    word, node, clock, how, text = line.split(" ", 4)
    assert (word, node) == ("screen", "node7") and clock.isdigit()
    return how, text


def test_a_fit_node_says_so_and_leaves_its_file(folder: Path) -> None:
    process = start(folder, "7.1")
    how, text = answer_of(process)
    assert (how, process.returncode) == ("ok", 0), text
    assert sorted(path.name for path in folder.iterdir()) == [".token", "node7"]
    assert (folder / "node7").read_text() == "7.1"


def test_the_first_node_is_unfit_and_lets_the_others_meet_all_the_same(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = ("--meet", f"localhost:{port}", "--nodes", "2")
    first, second = start(folder, "7.2", *meet, node="localhost"), start(folder, "7.1", *meet)
    how, text = answer_of(second)
    assert (how, second.returncode) == ("ok", 0), text
    line = first.communicate(timeout=120)[0]
    assert line.startswith("screen localhost ") and " unfit " in line and first.returncode == 1


def test_what_hangs_is_named_when_its_time_is_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".token")  # who reads it waits for ever
    process = start(tmp_path, "7.1", "--limit", "0.2")
    assert answer_of(process) == ("unfit", "no result after 0.2 s: the run's directory")
    assert process.returncode == 1


def test_a_node_that_is_asked_to_stop_is_not_unfit(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".token")
    process = start(tmp_path, "7.1", "--limit", "100")
    with (tmp_path / ".token").open("w"):  # it has it open as well, and waits for what is written
        process.send_signal(signal.SIGUSR1)
        assert answer_of(process) == ("stopped", "SIGUSR1")
    assert process.returncode == STOPPED


def test_a_folder_of_another_file_system_is_told_from_the_shared_one(folder: Path) -> None:
    with pytest.raises(Unfit, match="is not the folder that the job's first node has"):
        screen.check_folder(folder, "7.2", "node7")
    (folder / ".token").unlink()
    with pytest.raises(Unfit, match="not shared with this node: .*: No such file or directory"):
        screen.check_folder(folder, "7.1", "node7")


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "node7").mkdir()
    with pytest.raises(Unfit, match="cannot be written: .*: Is a directory"):
        screen.check_folder(folder, "7.1", "node7")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    screen.check_disk([tmp_path], least=1)
    with pytest.raises(Unfit, match=rf"{tmp_path}: \d+ MiB are free, {1 << 40} are needed"):
        screen.check_disk([tmp_path], least=1 << 60)


@pytest.mark.parametrize("held, idle", [(0, True), (4.9, True), (5.1, False), (70, False)])
def test_a_gpu_whose_memory_others_hold_is_not_idle(held: float, idle: bool) -> None:
    free, total = int((80 - held) * GIB), 80 * GIB
    if idle:
        screen.check_idle("GPU 3", free, total)
        return
    with pytest.raises(Unfit, match="GPU 3 is not idle: .* of 81920 MiB are held by others"):
        screen.check_idle("GPU 3", free, total)


def test_gpus_that_do_not_answer_are_counted() -> None:
    there = torch.cuda.device_count()
    with pytest.raises(Unfit, match=f"{there + 1} GPUs are allocated, {there} answer"):
        screen.check_gpus(there + 1)
    assert screen.check_gpus(0) == [torch.device("cpu")]


def test_a_wrong_matrix_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: Sequence[torch.device] = [torch.device("cpu")]
    screen.check_products(devices)
    to = torch.Tensor.to

    def flipped(tensor: torch.Tensor, *words: object) -> torch.Tensor:
        """As on a device that loses one value of a matrix."""
        moved = to(tensor, *words).clone()
        moved[3, 5] += 1
        return moved

    monkeypatch.setattr(torch.Tensor, "to", flipped)
    with pytest.raises(Unfit, match="cpu computes wrongly: [1-9][0-9]* values"):
        screen.check_products(devices)


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    screen.check_sum_on_network(timedelta(seconds=30))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    with pytest.raises(Unfit, match="gloo does not work over ib77: .*"):
        screen.check_sum_on_network(timedelta(seconds=30))
