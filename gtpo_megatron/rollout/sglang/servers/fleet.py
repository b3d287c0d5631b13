"""The workers of a run, and who may send what to which: the state machine, without the tasks that drive it.

All of this runs in one event loop; nothing here may be called from another thread.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.client import ServerFault
from gtpo_megatron.rollout.sglang.servers.places import Places
from gtpo_megatron.rollout.sglang.servers.router import Router
from gtpo_megatron.rollout.sglang.servers.states import WHOLE, Part, State, Worker

T = TypeVar("T")


class Fleet:
    """All workers of a run, the places on them, and those who wait for one."""

    def __init__(self, config: SGLangConfig, router: Router | None, sockets: int) -> None:
        self.workers: list[Worker] = []
        self.tag: str | None = None  # weights that may be sampled from
        self.gate_open = False  # closed while weights are replaced, or the servers' memory is not all theirs
        self.allowed: frozenset[Part] = WHOLE  # what of their memory servers may hold now
        self.router = router
        self.failure: BaseException | None = None
        self.shortage = ""  # while an update waits for its quorum: how many servers are missing
        self._config = config
        self._places = Places(config.concurrency, sockets)
        self._waiters: deque[tuple[asyncio.Future[Worker], Worker | None]] = deque()
        self._ready_at = asyncio.get_running_loop().time()

    # ------------------------------------------------------------------ states

    @property
    def ready(self) -> list[Worker]:
        """The workers that may be sampled from."""
        return [worker for worker in self.workers if worker.state == "ready"]

    def ready_urls(self) -> frozenset[str]:
        """Their URLs."""
        return frozenset(worker.url for worker in self.ready)

    def move(self, worker: Worker, state: State, reason: str) -> None:
        """Change a worker's state; who waits for a ready one is served."""
        was_ready = worker.state == "ready"
        worker.move(state, reason)
        if was_ready != (state == "ready"):
            (self._places.close if was_ready else self._places.open)(worker)
            if was_ready and self.router is not None:
                self.router.doubt()  # it may still send requests there
        self.dispatch()

    def suspect(self, worker: Worker, reason: str) -> None:
        """Take a ready worker out until its supervisor has examined it."""
        if worker.state == "ready":
            worker.faults += 1
            self.move(worker, "suspect", reason)

    def outdated(self, worker: Worker, held: str) -> None:
        """Take out a worker that answered with other weights than the current ones: it was restarted behind our back."""
        if worker.state == "ready":
            worker.tag = None
            self.move(worker, "stale", f"holds the weights {held}")

    def lose(self, worker: Worker, reason: str) -> None:
        """Give a worker up; the requests that it holds are sent elsewhere."""
        self.move(worker, "down", reason)
        losers = [worker]
        if self._config.router:
            # Nobody knows which requests the lost server held. If it has ended, or will be (our own), the router fails these.
            losers = [] if worker.owned or not worker.listens else self.workers
        for task in [task for w in losers for task in w.requests]:
            task.cancel()

    def fail(self, error: BaseException) -> None:
        """A mistake in the program: it must reach the run, which would wait for ever."""
        self.failure = error
        self._fail_waiters(error)

    # ------------------------------------------------------------------ places

    async def acquire(self, preferred: Worker | None, first: bool) -> Worker:
        """A place on a ready worker, least loaded or the preferred one; `first` goes before all who wait.

        Raises:
            UserError: no server has been ready for no_server_timeout_s.
        """
        if self.failure is not None:
            raise self.failure
        if not self._waiters and (worker := self._pick(preferred)):
            return worker
        place: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        (self._waiters.appendleft if first else self._waiters.append)((place, preferred))
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release(place.result())
            raise

    def release(self, worker: Worker) -> None:
        """Give a place back."""
        self._places.give_back(worker)
        self.dispatch()

    def dispatch(self) -> None:
        """Serve those who wait, in order, as far as there are places."""
        while self._waiters:
            place, preferred = self._waiters[0]
            if place.done():
                self._waiters.popleft()
            elif worker := self._pick(preferred):
                self._waiters.popleft()
                place.set_result(worker)
            else:
                return

    async def watch_waiters(self) -> None:
        """Tell those who wait when there has been no server for too long. Never returns."""
        clock = asyncio.get_running_loop().time
        while True:
            if self.ready or not self.gate_open or not self._waiters:
                self._ready_at = clock()
            elif clock() - self._ready_at > self._config.no_server_timeout_s:
                self._fail_waiters(self.no_server())
                self._ready_at = clock()  # who comes later has the same time
            await asyncio.sleep(0.2)

    def note_shortage(self) -> str:
        """How many servers a quorum lacks (rollout.sglang.quorum), kept in `shortage`; "" where there are enough."""
        ready, needed = len(self.ready), self._config.needed(len(self.workers))
        self.shortage = (
            f"{ready} of {len(self.workers)} servers hold the current weights, {needed} are needed "
            f"(rollout.sglang.quorum: {self._config.quorum})"
            if ready < needed
            else ""
        )
        return self.shortage

    def troubles(self) -> list[str]:
        """How many servers are waited for, and a line for each that cannot be sampled from."""
        return [self.shortage] * bool(self.shortage) + [
            f"{w.url or f'server {w.index}'}: {w.state}, {w.reason}"
            + (f"; before that: {w.trouble}" if w.trouble not in ("", w.reason) else "")
            for w in self.workers
            if w.state != "ready"
        ]

    def no_server(self) -> UserError:
        """The error of a run without servers, or without its quorum of them."""
        reasons = "\n".join(f"  {line}" for line in self.troubles())
        few = "too few SGLang servers have" if self.ready else "no SGLang server has"
        return UserError(
            f"{few} been usable for "
            f"{self._config.no_server_timeout_s:g} s (rollout.sglang.no_server_timeout_s):\n{reasons}"
        )

    def _pick(self, preferred: Worker | None) -> Worker | None:
        return self._places.take(preferred) if self.gate_open else None

    def _fail_waiters(self, error: BaseException) -> None:
        while self._waiters:
            place, _ = self._waiters.popleft()
            if not place.done():
                place.set_exception(error)

    # ------------------------------------------------------------------ requests

    async def run(self, worker: Worker, send: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
        """Send one request to an acquired worker (through the router where there is one) and give the place back.

        Raises:
            ServerFault: the worker (or router) failed, or was given up while the request was under way.
        """
        routed = self.router.url if self.router is not None else None
        on_fault = self.suspect if routed is None else self._router_failed
        try:
            answer = await self.ask(worker, send(routed or worker.url), on_fault)
        finally:
            self.release(worker)
        if routed is None:  # behind a router another may have answered
            worker.faults = 0
            worker.heard_at = asyncio.get_running_loop().time()
        return answer

    async def ask(
        self,
        worker: Worker,
        question: Coroutine[Any, Any, T],
        on_fault: Callable[[Worker, str], None] | None = None,
    ) -> T:
        """Await a worker's answer, as long as the worker is not given up. `on_fault` is told of the question's own fault.

        Raises:
            ServerFault: it was given up meanwhile (behind a router: any that may have had it was); or the question's own.
        """
        task = asyncio.create_task(question)
        worker.requests.add(task)
        try:
            return await task
        except ServerFault as fault:
            if on_fault is not None:
                on_fault(worker, str(fault))
            raise
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ServerFault(f"{worker.url}: {worker.reason}") from None
        finally:
            worker.requests.discard(task)

    def _router_failed(self, _: Worker, reason: str) -> None:
        """The router names the server that it could not reach. Of all else that fails it is the suspect itself."""
        assert self.router is not None
        answer = reason.partition(" answered ")[2]
        unreached = [worker for worker in self.workers if worker.url and f"{worker.url}/" in answer]
        for worker in unreached:
            self.suspect(worker, reason)
        if not unreached:
            self.router.doubt()
