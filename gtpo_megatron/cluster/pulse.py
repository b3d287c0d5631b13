"""A sign of life of every rank, for slurm/lib.sh, which ends a step whose ranks do not all give it; and stacks when it asks.

A rank renews a file of its own in the folder $GTPO_PULSE, from a thread: a process that is stopped, or stuck in the kernel or in
code that never lets Python go on, does not. faulthandler writes the stacks: unlike py-spy it needs no right to trace processes,
which containers take away, and works where the main thread is inside a collective.
"""

import atexit
import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

FOLDER = "GTPO_PULSE"
BEAT_S = 5.0


def give_pulse(environ: Mapping[str, str], beat_s: float = BEAT_S) -> None:
    """Renew <folder>/<rank>.<node> until this process ends, and write all threads' stacks to stderr at SIGUSR2.

    Does nothing where no folder is named.
    """
    if not environ.get(FOLDER):
        return
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    file = Path(environ[FOLDER]) / f"{environ.get('RANK', '0')}.{environ.get('SLURMD_NODENAME', 'localhost')}"
    ended = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):  # a file system that is away for a while is no reason to end
                file.touch()
            if ended.wait(beat_s):
                return

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()

    def end(owner: int) -> None:
        if os.getpid() == owner:  # no child of a fork
            ended.set()
            thread.join(beat_s)
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    atexit.register(end, os.getpid())
