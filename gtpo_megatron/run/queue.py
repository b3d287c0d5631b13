"""The queue before the rollout engine: what wants it takes turns, one at a time and in a defined order.

Of the jobs that wait the most urgent is next, however long the others have waited: an update, for which training stands
still, before an evaluation, before what a batch that was begun still lacks, before the next batch ahead. So with n batches
ahead an update waits for the one that is being sampled and for no other.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum


class Job(IntEnum):
    """What uses the engine, the most urgent first."""

    UPDATE = 0  # new weights, and their certificate
    EVALUATION = 1  # all suites of a step
    REPLACEMENT = 2  # of groups without signal: a round of them
    BATCH = 3  # a step's first round


NAMES = {
    Job.UPDATE: "new weights",
    Job.EVALUATION: "the evaluation",
    Job.REPLACEMENT: "replacements for the batch of step",
    Job.BATCH: "the batch of step",
}


@dataclass(eq=False)
class Place:
    """One job in the queue. `beside`: it interrupts what is under way instead of waiting for its end."""

    job: Job
    step: int
    arrival: int
    beside: bool
    since: float = 0.0  # time.perf_counter() when its turn came

    @property
    def urgency(self) -> tuple[int, int, int]:
        """Smaller goes first: by job, then by step, then as they came."""
        return self.job, self.step, self.arrival

    def __str__(self) -> str:
        return NAMES[self.job] + (f" {self.step + 1}" if self.job >= Job.REPLACEMENT else "")


class EngineQueue:
    """Turns of one rank's engine. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrivals = itertools.count()
        self._waiting: list[Place] = []
        self._under_way: list[Place] = []

    def enter(self, job: Job, step: int = 0, *, beside: bool = False) -> Place:
        """Take a place, for `turn`. With nobody under way its turn has come at once."""
        with self._changed:
            place = Place(job, step, next(self._arrivals), beside)
            self._waiting.append(place)
            self._call_next()
        return place

    @contextmanager
    def turn(self, place: Place) -> Iterator[None]:
        """Wait for the place's turn; it ends with the context."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: place in self._under_way)
            yield
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        """Give up a place, or end its turn; one that has left already may do so again."""
        with self._changed:
            for places in (self._waiting, self._under_way):
                if place in places:
                    places.remove(place)
            self._call_next()

    def waits_for(self) -> str:
        """What the training loop waits for here, for people; "" if it does not."""
        with self._changed:
            stands = any(place.job < Job.REPLACEMENT for place in self._waiting)
            return (
                f"the engine, which is busy with {self._under_way[0]}" if stands and self._under_way else ""
            )

    def _call_next(self) -> None:
        while self._waiting:
            place = min(self._waiting, key=lambda waiting: waiting.urgency)
            if self._under_way and not (place.beside and not any(p.beside for p in self._under_way)):
                return
            self._waiting.remove(place)
            self._under_way.append(place)
            place.since = time.perf_counter()
            self._changed.notify_all()
