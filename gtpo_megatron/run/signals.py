"""Ctrl-C, SIGTERM and SIGUSR1: a run that is asked to stop ends soon, on all ranks, and goes on another day."""

import logging
import signal
import threading
import uuid
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from gtpo_megatron import control
from gtpo_megatron.run.held_back import HeldBack

log = logging.getLogger(__name__)
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.5  # until a rank that samples hears that another was asked


class Interrupted(Exception):
    """What was under way is dropped because the run is asked to stop; the process that goes on does it again."""


class StopSignals:
    """Knows whether the run is asked to stop. Use as a context, in the main thread; building it is collective.

    The handler itself notes the signal and nothing more; a thread does what follows from it. A signal may reach one rank
    alone: it posts that to the others (`control.post`), of which those that `listen` look for it while they sample.

    Args:
        on_stop: called once, in another thread, as soon as this rank knows.
        listen: whether to look for what other ranks post.
    """

    def __init__(self, on_stop: Callable[[], None], listen: bool) -> None:
        self.asked = False  # to stop, as far as this rank knows
        self._signalled = False  # this rank itself
        self._on_stop = on_stop
        self._word = f"stop/{control.broadcast_from_zero(uuid.uuid4().hex)}"
        self._listen = listen and dist.get_world_size() > 1
        # of all that could wake the thread, this one's put may be called from a signal handler
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._previous: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in NUMBERS}
        for number, previous in self._previous.items():
            if isinstance(previous, HeldBack) and previous.came:
                previous.came = False
                self._handle(number, None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._wake.put(False)
        self._thread.join()

    def agree(self, reason: bool = False) -> bool:
        """Whether any rank is asked to stop, or has another `reason` to; if so, all are from now on. Collective."""
        return self.cut_short(reason or self.asked)

    def cut_short(self, own: bool) -> bool:
        """Whether the stop cut something short on any rank; if so, all are asked to stop. Collective."""
        found = control.agree(own) is not None
        if found and not self.asked:
            self._wake.put(True)
        return found

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self._signalled = self.asked = True
        self._wake.put(True)

    def _watch(self) -> None:
        if self._heard():
            self.asked = True
            self._on_stop()

    def _heard(self) -> bool:
        """Wait until this rank is asked, or hears that another is (True), or the run has ended (False)."""
        listen = self._listen
        while True:
            try:
                if asked := self._wake.get(timeout=POLL_S if listen else None):
                    _quietly(lambda: control.post(self._word))
                return asked
            except Empty:
                posted = _quietly(lambda: control.posted(self._word))
                if posted:
                    return True
                listen = posted is not None


def _quietly(action: Callable[[], bool | None]) -> bool | None:
    """None where the store is gone: the rank that held it has ended, and this one will find out by itself."""
    try:
        return bool(action())
    except RuntimeError as error:  # torch's DistError
        log.warning("other ranks cannot be told, or heard, about a stop: %s", error)
        return None
