"""A rank that starts is asked to stop: that waits until the run can see to it. Imported before torch is."""

import signal
from types import FrameType


class HeldBack:
    """A signal's handler that only notes that it has come; who takes its place sees to it (`run.signals.StopSignals`)."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        self.came = True


def hold_back_stop() -> None:
    """Of SIGUSR1, which Slurm sends to all ranks, each at another place of its start.

    One that ended at once would end some of the others by an error: a collective without it. SIGTERM does not wait: Slurm
    leaves it half a minute, and there is nothing to save yet.
    """
    signal.signal(signal.SIGUSR1, HeldBack())
