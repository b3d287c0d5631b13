"""Whether this process gets on. A rank may be alive, heartbeat and all, and wait for ever for another inside a collective.

What does the work says so: `stage` where a stage begins and ends, `progress` at each of its parts (a micro-batch). A thread
ends the process where nothing is said for too long in a stage in which ranks wait for nobody but each other. All ranks of a
collective that will never end find so at about the same time, and each leaves its stacks. What waits for servers, prompts or
a file system has limits of its own. Standard library only.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gtpo_megatron.errors import STUCK

WATCHED = frozenset({"training"})  # stages
POLL_S = 5.0


@dataclass(frozen=True)
class Sign:
    """The last that was heard."""

    stage: str
    time: float  # time.monotonic()


_last = Sign("", time.monotonic())


def stage(name: str) -> None:
    """This process is in the stage of this name from now on; "" between stages."""
    global _last
    _last = Sign(name, time.monotonic())


def progress() -> None:
    """A part of the stage is done."""
    stage(_last.stage)


def silent_s() -> float:
    """Seconds since the last sign, in a stage that is watched; 0 elsewhere."""
    last = _last
    return time.monotonic() - last.time if last.stage in WATCHED else 0.0


def watch(limit_s: float, poll_s: float = POLL_S, lost: Callable[[], str] = lambda: "") -> None:
    """End this process with STUCK and the stacks of its threads, once there is no sign for `limit_s`. 0: never.

    `lost` says which of those that it may wait for are no more.
    """
    if not limit_s:
        return

    def look() -> None:
        while True:
            time.sleep(min(poll_s, limit_s))
            if silent_s() > limit_s:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                print(
                    f"rank {os.environ.get('RANK', '0')}: no progress in stage {_last.stage} for {silent_s():.0f} s; it ends "
                    f"(training.stuck_after_s: {limit_s:g})"
                    + (f"; no answer from {gone}" if (gone := lost()) else ""),
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(STUCK)

    threading.Thread(target=look, name="vigil", daemon=True).start()
