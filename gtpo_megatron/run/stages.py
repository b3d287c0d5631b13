"""The stages of a step: shown, timed, and named in the run's status."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gtpo_megatron import vigil
from gtpo_megatron.policy import platform
from gtpo_megatron.run.directory import Owner
from gtpo_megatron.run.progress import RunProgress


class Stages:
    """Stages may stand inside others; the time of the inner one is its own alone."""

    def __init__(self, progress: RunProgress, owner: Owner | None) -> None:
        """`owner`: of the run's directory, on the rank that has it."""
        self.seconds: dict[str, float] = {}  # by stage, since it was last cleared
        self._progress, self._owner = progress, owner
        self._inner_seconds = 0.0  # of the stages inside the one that is open
        self._open = ""  # the innermost

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show and time a stage, in seconds; a stage inside another is not counted twice."""
        with self._progress.stage(name), self._in_status(name):
            started, outer, self._inner_seconds = time.perf_counter(), self._inner_seconds, 0.0
            try:
                yield
            finally:
                platform.synchronize()
                elapsed = time.perf_counter() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner_seconds
                self._inner_seconds = outer + elapsed

    @contextmanager
    def _in_status(self, name: str) -> Iterator[None]:
        outer = self._open
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        self._open = name
        vigil.stage(name)
        if self._owner is not None:
            self._owner.stage(name)
