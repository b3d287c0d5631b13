"""A line for whoever waits: what lasts is named every half a minute."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

Note = Callable[[str], None]  # takes a line for the user


class Ticker:
    """Says what is under way, in a thread of its own, each time that has gone on for `every_s` seconds. Use as a context."""

    def __init__(self, note: Note, every_s: float = 30.0) -> None:
        self._note, self._every_s = note, every_s
        self._state: Callable[[], str] | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ticker", daemon=True)

    @contextmanager
    def on(self, state: Callable[[], str]) -> Iterator[None]:
        """What is under way inside, as a line; asked for each time that it is said."""
        self._since, self._state = time.monotonic(), state
        try:
            yield
        finally:
            self._state = None

    def _watch(self) -> None:
        said = 0.0
        while not self._ended.wait(min(1.0, self._every_s / 4)):
            state, since = self._state, self._since
            if state is not None and time.monotonic() - max(since, said) >= self._every_s:
                said = time.monotonic()
                self._note(f"{state()} ({said - since:.0f} s)")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
