"""What a server of a run may be, and what it may become.

A worker is sampled from only in state `ready`: it has confirmed the current weights. Every other way ends there again:

    down -> (restarted, or answering again) -> stale -> (current weights sent, checked) -> ready
    ready -> suspect (a request failed, or health did) -> ready | stale | down
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from gtpo_megatron.rollout.sglang.servers.launch import Process
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.outlets import COLLECTIVE_S

log = logging.getLogger(__name__)
State = Literal["down", "stale", "suspect", "ready"]
Part = Literal["weights", "kv_cache"]  # of a server's memory, by SGLang's names
WHOLE: frozenset[Part] = frozenset({"weights", "kv_cache"})
# state -> what may follow it. A lost server is never merely suspected, and nothing but an examination clears a suspect.
MOVES: dict[State, frozenset[State]] = {
    "down": frozenset(
        {"stale", "ready"}
    ),  # ready: a given server that kept the current weights all the while
    "stale": frozenset({"ready", "suspect", "down"}),
    "suspect": frozenset({"ready", "stale", "down"}),
    "ready": frozenset({"suspect", "stale", "down"}),
}


@dataclass(frozen=True)
class Timing:
    """How patient the pool is; seconds."""

    health_interval_s: float = 5.0  # of silence, before a server is asked
    health_pause_s: float = 2.0  # between two that are asked, with two calls each: a call a second in all
    health_timeout_s: float = 25.0  # SGLang's own check gives up after 20
    health_failures: int = 3  # in a row, before a server that does not answer is given up
    drain_s: float = 60.0  # for aborted requests to come back before an update
    control_s: float = 60.0  # for a call that moves no weights: pause, go on, flush
    transfer_s: float = 600.0  # for one call that does
    collective_s: float = COLLECTIVE_S  # for the broadcast of one bucket, and for joining its group
    gather_s: float = 1.0  # after a server has become stale, for others to be restored with it
    backoff_s: float = 1.0  # before a second restart; doubles
    backoff_max_s: float = 60.0
    attempts: int = 6  # failures of one request, on whatever servers, before the run stops


@dataclass(eq=False)
class Worker:
    """One server."""

    index: int
    url: str
    owned: bool
    process: Process | None = None
    ranks: int = 1
    first_gpu: int | None = None  # of one started here
    state: State = "down"
    tag: str | None = None  # weights that it has confirmed
    ever_up: bool = False
    listens: bool = True  # False: whoever asked last was refused the connection
    inflight: int = 0
    faults: int = 0  # in a row
    holds: frozenset[Part] = WHOLE  # of its memory; less only where trainer and servers take turns
    heard_at: float = 0.0  # when it was last asked or answered a request, by the event loop's clock
    idle: bool = False  # nothing is done to it but sampling
    checking: bool = False  # its health is asked for, by a request that it samples
    reason: str = "is starting"
    trouble: str = ""  # why it was last taken out
    misfit: str = ""  # how what it serves is not the policy
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def target(self) -> Target:
        """What a weight transfer needs to know."""
        return Target(self.url, self.ranks, self.first_gpu)

    @property
    def died(self) -> str | None:
        """How the process of a server started here ended; None while it runs, and of a given server."""
        if self.process is None or self.process.alive:
            return None
        return f"ended; {self.process.log} ends:\n{self.process.tail(5)}"

    def move(self, state: State, reason: str) -> None:
        """Become `state`, and wake who watches over the worker.

        Raises:
            RuntimeError: MOVES does not know this move.
        """
        if state != self.state:
            if state not in MOVES[self.state]:
                raise RuntimeError(f"{self.url}: {self.state} -> {state} ({reason}) is no move of a server")
            level = logging.WARNING if state in ("down", "suspect") else logging.INFO
            log.log(level, "SGLang server %s: %s -> %s %s", self.url, self.state, state, reason)
        self.state, self.reason = state, reason
        if state in ("down", "suspect"):
            self.trouble = reason
        self.wake.set()
