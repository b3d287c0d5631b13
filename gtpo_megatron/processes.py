"""Processes that this program starts, and their end: how they are killed, and that none outlives its owner.

    python -I processes.py OWNER_PID COMMAND...

runs a command and ends with its owner: however that ends, SIGKILL included, the command and all its children are killed
within a second. Standard library only, and nothing of ours: it runs as a script in any interpreter.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
POLL_S = 0.3
GRACE_S = 5.0


def kill_group(leader: int) -> None:
    """SIGKILL a process and all its children, those that are stopped as well; it must lead a group (`start_new_session`)."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended by themselves


def wait_for_end_of(owner: int, until: Callable[[], bool] = lambda: False) -> bool:
    """Wait for the end of this process's owner, its parent (True), or until something else is so (False).

    The owner's death shows as a change of this process's parent, which, unlike PR_SET_PDEATHSIG, does not depend on the
    thread that started it, and unlike a pipe is not kept open by the owner's other children.
    """
    while os.getppid() == owner:
        if until():
            return False
        time.sleep(POLL_S)
    return True


def end_with(owner: int) -> NoReturn:
    """Wait for the end of this process's owner, and kill this process with its group. For a thread of its own."""
    wait_for_end_of(owner)
    kill_group(os.getpgrp())
    raise AssertionError("SIGKILL returned")


def _die_with_watchdog() -> None:
    """In the command's process: SIGKILL it when the watchdog itself is killed (single-threaded, so this is exact)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(child: subprocess.Popen[bytes]) -> NoReturn:
    """SIGTERM, a few seconds' grace, then SIGKILL to the whole group, this process included."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("SIGKILL returned")


def main() -> None:
    owner, command = int(sys.argv[1]), sys.argv[2:]
    ended = False

    def end(signum: int, frame: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Slurm asks every process of a step to stop, where the owner alone is meant; the command inherits this
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    child = subprocess.Popen(command, preexec_fn=_die_with_watchdog)
    if not wait_for_end_of(owner, until=lambda: ended or child.poll() is not None) and not ended:
        print(f"watchdog: the command ended with code {child.returncode}", file=sys.stderr, flush=True)
    _end_group(child)


if __name__ == "__main__":
    main()
