"""A lost peer is named by all that are left, at once, whichever of them notices first and however."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORLD = 3
RANK = """\
import datetime, json, os, signal, sys, time
import torch, torch.distributed as dist
from gtpo_megatron import control, rollcall
rank, how, out = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
store = dist.TCPStore("127.0.0.1", int(os.environ["STORE"]), is_master=False)
dist.init_process_group(
    "gloo", store=store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=4)
)
control.group()
rollcall.answer_calls(poll_s=0.1)
dist.barrier()
if rank == 1 and how == "dies":
    os._exit(9)
if rank == 1 and how == "hangs":
    os.kill(os.getpid(), signal.SIGSTOP)
begun = time.monotonic()
try:
    if rank == 2 and how == "errs":
        raise RuntimeError("an error of its own")
    for _ in range(2):
        dist.all_reduce(torch.ones(1))
    said = "nothing"
except RuntimeError as error:
    lost = rollcall.peers_lost(error, patience_s=2.0)
    said = str(lost) if lost else f"own: {error}"
with open(f"{out}/{rank}", "w") as file:
    json.dump([said, time.monotonic() - begun], file)
if how == "errs":
    time.sleep(6.0)  # alive, as a rank that writes its traceback may be
os._exit(0)
"""


@pytest.mark.parametrize("how", ["dies", "hangs", "errs"])
def test_all_that_are_left_name_the_rank_that_was_lost(how: str, tmp_path: Path) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, how, str(tmp_path)],
            env=os.environ | {"RANK": str(rank), "STORE": str(store.port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    try:
        left = [0, 2] if how != "errs" else [0, 1, 2]
        deadline = time.monotonic() + 120.0
        while not all((tmp_path / str(rank)).exists() for rank in left) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in left:
            ranks[rank].wait(60.0)
        said = {rank: json.loads((tmp_path / str(rank)).read_text()) for rank in left}
    finally:
        for process in ranks:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
    if how == "errs":
        assert said[2][0] == "own: an error of its own"
        assert all(
            text.startswith("own: ") for text, _ in said.values()
        )  # all were there when they were called
        return
    for text, seconds in said.values():
        assert text.startswith(f"no answer from rank 1 on {socket.gethostname()}: ended, or cut off.")
        assert seconds < 30.0
