"""Is this node fit to train? Asked before the ranks start, one task a node; slurm/lib.sh acts on the answer.

    python -m gtpo_megatron.machine.screen FOLDER TOKEN [--limit SECONDS] [--meet HOST:PORT --nodes N]

FOLDER is one that all nodes share, in which `.token` says TOKEN: a node that sees it there, and whose own file the job's first
node sees, has the same file system. The answer is one line on standard output, so that a node without the file system can give
it as well, after one for each other node that it does not reach:

    screen NODE CLOCK ok|unfit|stopped TEXT        CLOCK: seconds since the epoch, as this node believes
    screen NODE CLOCK cut PEER TEXT

What is looked at: the folder, free disk, the GPUs that Slurm promises and their memory, a matrix product on each (on the CPU
without GPUs), an all-reduce over all GPUs of the node, and one over its network interface; then, where there are several nodes,
what is between them (gtpo_megatron/machine/links.py), for which they meet at HOST:PORT, HOST being the first of N.
"""

import argparse
import importlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from gtpo_megatron.errors import STOPPED
from gtpo_megatron.machine.links import Broken, Meeting, TooLate, check_links, stay_away

if TYPE_CHECKING:
    import torch

LEAST_FREE_BYTES = 1 << 30  # of the run's folder, and of the node's own temporary one
IDLE_SHARE, IDLE_BYTES = 0.05, 1 << 30  # of a GPU's memory that driver and this process may hold
SIZE, DEPTH, REPEATS = 2048, 256, 20
Answer = Literal["ok", "unfit", "stopped", "cut"]


class Unfit(Exception):
    """Why no rank should start on this node."""


def check_folder(folder: Path, token: str, node: str) -> None:
    """The shared folder is there, is the one that the job's first node has, and can be written: leaves the file `node`."""
    try:
        seen = (folder / ".token").read_text().strip()
    except OSError as error:
        raise Unfit(f"the run's directory is not shared with this node: {folder}: {error.strerror}") from None
    if seen != token:
        raise Unfit(f"{folder} is not the folder that the job's first node has")
    partial = folder / f".{node}.partial"
    try:
        partial.write_text(token)
        partial.replace(folder / node)
    except OSError as error:
        raise Unfit(f"the run's directory cannot be written: {folder}: {error.strerror}") from None


def check_disk(folders: Sequence[Path], least: int = LEAST_FREE_BYTES) -> None:
    """The folders' file systems have `least` bytes free each."""
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < least:
            raise Unfit(f"{folder}: {free >> 20} MiB are free, {least >> 20} are needed")


def check_gpus(expected: int) -> "list[torch.device]":
    """The devices to compute on: `expected` idle GPUs, or the CPU where none is expected."""
    import torch

    if not expected:
        return [torch.device("cpu")]
    found = torch.cuda.device_count()
    if found < expected:
        raise Unfit(f"{expected} GPUs are allocated, {found} answer")
    for number in range(expected):
        free, total = torch.cuda.mem_get_info(number)
        check_idle(f"GPU {number}", free, total)
    return [torch.device("cuda", number) for number in range(expected)]


def check_idle(name: str, free: int, total: int) -> None:
    """Nobody else holds memory of a GPU; in bytes."""
    held = total - free
    if held > IDLE_SHARE * total + IDLE_BYTES:
        raise Unfit(f"{name} is not idle: {held >> 20} of {total >> 20} MiB are held by others")


def check_products(devices: "Sequence[torch.device]") -> None:
    """Products of matrices of -1, 0 and 1 are exact, to the bit, in every precision and order of summation used."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-1, 2, shape, generator=generator) for shape in ((SIZE, DEPTH), (DEPTH, SIZE))
    )
    expected = left.double() @ right.double()
    for device in devices:
        kind, repeats = (torch.float32, 1) if device.type == "cpu" else (torch.bfloat16, REPEATS)
        a, b, c = (matrix.to(device, kind) for matrix in (left, right, expected))
        wrong = sum(int((a @ b != c).sum()) for _ in range(repeats))
        if wrong:
            raise Unfit(f"{device} computes wrongly: {wrong} values of {repeats} matrix product(s) differ")


def check_sum_on_gpus(devices: "Sequence[torch.device]") -> None:
    """An all-reduce over the GPUs of this node, by NCCL."""
    import torch

    if len(devices) < 2:
        return
    numbers = [torch.full((1 << 20,), float(n), device=device) for n, device in enumerate(devices)]
    torch.cuda.nccl.all_reduce(numbers)
    total = float(sum(range(len(devices))))
    for device, number in zip(devices, numbers, strict=True):
        if not bool((number == total).all()):
            raise Unfit(f"an all-reduce over {len(devices)} GPUs has a wrong sum on {device}")


def check_sum_on_network(limit: timedelta) -> None:
    """An all-reduce of two ranks, both here, by gloo over the interface that is named for it (GLOO_SOCKET_IFNAME)."""
    import torch
    import torch.distributed as dist

    store = dist.HashStore()

    def rank(number: int) -> float:
        group = dist.ProcessGroupGloo(store, number, 2, limit)
        numbers = torch.full((1 << 16,), float(number + 1))
        group.allreduce([numbers]).wait()
        return float(numbers.mean())

    with ThreadPoolExecutor(2) as threads:
        try:
            sums = list(threads.map(rank, range(2)))
        except RuntimeError as error:
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "the default interface")
            raise Unfit(f"gloo does not work over {interface}: {str(error).splitlines()[0]}") from None
    if sums != [3.0, 3.0]:
        raise Unfit(f"an all-reduce over the network interface has wrong sums: {sums}")


def screen(
    folder: Path, token: str, expected_gpus: int, limit_s: float, node: str, give_up: Callable[[str], None]
) -> "torch.device":
    """All checks of this node alone; the device to go on with. Raises Unfit, also in the place of an error that nobody has foreseen.

    Args:
        limit_s: for the checks before torch is loaded, and for those after.
        give_up: called with a text, from a thread, where one of them takes longer.
    """
    check: list[str] = ["the run's directory"]
    try:
        with _limit(limit_s, check, give_up):
            check_folder(folder, token, node)
            check[0] = "free disk"
            check_disk([folder, Path(tempfile.gettempdir())])
        check[0] = "torch"
        importlib.import_module("torch.distributed")  # a slow file system may take minutes for it: no limit
        check[0] = "the GPUs"
        with _limit(limit_s, check, give_up):
            devices = check_gpus(expected_gpus)
            check[0] = "a matrix product"
            check_products(devices)
            check[0] = "an all-reduce over the GPUs"
            check_sum_on_gpus(devices)
            check[0] = "an all-reduce over the network interface"
            check_sum_on_network(timedelta(seconds=limit_s))
    except (OSError, RuntimeError, ImportError) as error:  # CUDA's errors are RuntimeErrors
        raise Unfit(f"{check[0]}: {type(error).__name__}: {error}") from error
    return devices[0]


def screen_links(meeting: Meeting, device: "torch.device", limit_s: float) -> None:
    """What is between this node and the others: an answer for each that it does not reach.

    Raises Unfit where that cannot be said of a link.
    """

    def tell(broken: Broken) -> None:
        answer(meeting.node, "cut", f"{broken.peer} {broken.why}")

    def bounded(peer: str, seconds: float) -> AbstractContextManager[None]:
        def give_up(text: str) -> None:
            tell(Broken(peer, text))
            answer(meeting.node, "ok", "but for that")

        return _limit(seconds, ["the two have to do with each other"], give_up)

    try:
        check_links(meeting, device, limit_s, tell, bounded)
    except TooLate as reason:
        raise Unfit(str(reason)) from None
    except (OSError, RuntimeError) as error:
        raise Unfit(f"the meeting of the nodes at {meeting.host}:{meeting.port}: {error}") from error


@contextmanager
def _limit(seconds: float, check: Sequence[str], give_up: Callable[[str], None]) -> Iterator[None]:
    """End this process if the inside takes longer, after `give_up` was told: what hangs in a driver cannot be ended otherwise."""

    def end() -> None:
        give_up(f"no result after {seconds:g} s: {check[0]}")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def answer(node: str, how: Answer, text: str) -> None:
    """The line, whole."""
    line = f"screen {node} {int(time.time())} {how} {' '.join(text.split())}\n"
    os.write(1, line.encode())


def _stopper(node: str) -> Callable[[int, object], NoReturn]:
    def stop(number: int, _: object) -> NoReturn:
        answer(node, "stopped", signal.Signals(number).name)
        os._exit(STOPPED)

    return stop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is this node fit to train?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("token")
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument(
        "--meet", metavar="HOST:PORT", help="where the nodes meet: the first of them, and a port"
    )
    parser.add_argument("--nodes", type=int, default=1, help="that meet there")
    given = parser.parse_args(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _stopper(node))
    begun = time.monotonic()
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    meeting = None
    if given.meet and given.nodes > 1:
        host, _, port = given.meet.rpartition(":")
        meeting = Meeting(host, int(port), given.nodes, node)

    def refuse(text: str) -> None:
        answer(node, "unfit", text)
        if meeting:
            stay_away(meeting, given.limit, lambda _, seconds: _limit(seconds, [""], lambda _: None))

    try:
        device = screen(given.folder, given.token, gpus, given.limit, node, refuse)
    except Unfit as reason:
        refuse(str(reason))
        return 1
    try:
        if meeting:
            screen_links(meeting, device, given.limit)
    except Unfit as reason:
        answer(node, "unfit", str(reason))
        return 1
    answer(node, "ok", f"{gpus or 'no'} GPUs, in {time.monotonic() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
