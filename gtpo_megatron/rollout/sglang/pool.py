"""The servers of a run: which may be sampled from, which request goes where, and how a lost one comes back.

A worker is sampled from only in state `ready`: it has confirmed the current weights. Every other way ends there again:

    down -> (restarted, or answering again) -> stale -> (current weights sent, checked) -> ready
    ready -> suspect (a request failed, or health did) -> ready | stale | down

All of this runs in one event loop; nothing here may be called from another thread.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.registry import registered
from gtpo_megatron.rollout.sglang.buckets import Snapshot
from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers import Launch, Process, end_all
from gtpo_megatron.rollout.sglang.verify import checksums, differing
from gtpo_megatron.rollout.sglang.weights import Link, Target, Transfer

log = logging.getLogger(__name__)
T = TypeVar("T")
State = Literal["down", "stale", "suspect", "ready"]
START_ATTEMPTS = 2  # of a server's first start: another process may have taken its port
AFFINITY = 8  # completions of a group stay together, for the prefix cache, up to this much imbalance


@dataclass(frozen=True)
class Timing:
    """How patient the pool is; seconds."""

    health_interval_s: float = 5.0
    health_timeout_s: float = 25.0  # SGLang's own check gives up after 20
    health_failures: int = 3  # in a row, before a server that does not answer is given up
    drain_s: float = 60.0  # for aborted requests to come back before an update
    control_s: float = 60.0  # for a call that moves no weights: pause, go on, flush
    transfer_s: float = 600.0  # for one call that does
    collective_s: float = 120.0  # for the broadcast of one bucket, and for joining its group
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
    state: State = "down"
    tag: str | None = None  # weights that it has confirmed
    ever_up: bool = False
    inflight: int = 0
    faults: int = 0  # in a row
    reason: str = "is starting"
    trouble: str = ""  # why it was last taken out
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def target(self) -> Target:
        """What a weight transfer needs to know."""
        return Target(self.url, self.ranks)


class Pool:
    """All workers of a run."""

    def __init__(
        self,
        config: SGLangConfig,
        launch: Launch | None,
        client: Client,
        link: Link,
        timing: Timing = Timing(),
    ) -> None:
        self.config = config
        self.timing = timing
        self.client = client
        self.link = link
        self.launch = launch
        self.workers: list[Worker] = []
        self.tag: str | None = None  # weights that may be sampled from
        self.snapshot: Snapshot | None = None
        self.gate_open = False  # closed while weights are replaced
        self.updating = asyncio.Lock()
        self.router: tuple[Process, str, frozenset[str]] | None = None
        self.router_up = False
        self._waiters: deque[tuple[asyncio.Future[Worker], Worker | None]] = deque()
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._ready_at = asyncio.get_running_loop().time()
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------ start and end

    async def start(self) -> None:
        """Start or find the servers, and everything that watches over them. Does not wait for them."""
        if self.config.given:
            for url in read_urls(self.config):
                self._add(url, owned=False)
        else:
            for _ in range(self.config.servers):
                self._add("", owned=True)
        self._spawn(self, self._watch_waiters())
        if self.config.urls_file or self.config.urls_dir:
            self._spawn("urls", self._watch_urls())
        if self.config.router:
            self._spawn("router", self._keep_router())

    async def wait_started(self) -> None:
        """Wait until every server answers; of those that register themselves, until one does.

        Raises:
            UserError: a server ended twice, or did not answer within start_timeout_s; with the end of its log.
        """
        deadline = asyncio.get_running_loop().time() + self.config.start_timeout_s
        while (waiting := [w for w in self.workers if not w.ever_up]) or not self.workers:
            if self._failure is not None:
                raise self._failure
            if self.config.urls_dir and len(waiting) < len(self.workers):
                return
            if not waiting and asyncio.get_running_loop().time() > deadline:
                raise UserError(
                    f"no SGLang server has registered itself in {self.config.urls_dir} for "
                    f"{self.config.start_timeout_s:g} s (rollout.sglang.start_timeout_s)"
                )
            failed = [w for w in waiting if w.owned and w.faults >= START_ATTEMPTS]
            if failed or waiting and asyncio.get_running_loop().time() > deadline:
                worker = (failed or waiting)[0]
                tail = f"\n{worker.process.log}:\n{worker.process.tail()}" if worker.process else ""
                raise UserError(
                    f"the SGLang server {worker.url or worker.index} did not start "
                    f"(rollout.sglang.start_timeout_s: {self.config.start_timeout_s:g}): {worker.reason}{tail}"
                )
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        """End what this run started."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.link.close()
        processes = [w.process for w in self.workers if w.process] + ([self.router[0]] if self.router else [])
        end_all(processes, 3.0)  # blocks: at the interpreter's exit there are no more threads to be had
        await self.client.close()

    def _add(self, url: str, owned: bool) -> None:
        worker = Worker(len(self.workers), url, owned)
        self.workers.append(worker)
        self._spawn(worker, self._supervise(worker))

    def _spawn(self, key: object, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._on_end)
        self._tasks[key] = task

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """None of the pool's tasks ends by itself: a mistake in one must reach the run, not wait for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._fail_waiters(error)

    def _fail_waiters(self, error: BaseException) -> None:
        while self._waiters:
            place, _ = self._waiters.popleft()
            if not place.done():
                place.set_exception(error)

    # ------------------------------------------------------------------ requests

    @property
    def ready(self) -> list[Worker]:
        """The workers that may be sampled from."""
        return [worker for worker in self.workers if worker.state == "ready"]

    async def acquire(self, preferred: Worker | None, first: bool) -> Worker:
        """A place on a ready worker, least loaded or the preferred one; `first` goes before all who wait.

        Raises:
            UserError: no server has been ready for no_server_timeout_s.
        """
        if self._failure is not None:
            raise self._failure
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

    async def run(self, worker: Worker, send: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
        """Send one request to an acquired worker (through the router where there is one) and give the place back.

        Raises:
            ServerFault: the worker (or router) failed, or was given up while the request was under way.
        """
        routed = self.router_up and self.router is not None
        url = self.router[1] if routed and self.router else worker.url
        try:
            answer = await self.ask(worker, send(url), self._router_failed if routed else self.suspect)
        finally:
            self.release(worker)
        worker.faults = 0
        return answer

    async def ask(
        self,
        worker: Worker,
        question: Coroutine[Any, Any, T],
        on_fault: Callable[[Worker, str], None] | None = None,
    ) -> T:
        """Await a worker's answer, as long as the worker is not given up. `on_fault` is told of the question's own fault.

        Raises:
            ServerFault: it was given up meanwhile (behind a router: any worker was); or the question's own.
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

    def _router_failed(self, worker: Worker, reason: str) -> None:
        """Until it proves well, requests go straight to the workers."""
        self.router_up = False

    def suspect(self, worker: Worker, reason: str) -> None:
        """Take a ready worker out until its supervisor has examined it."""
        if worker.state == "ready":
            worker.faults += 1
            self._set(worker, "suspect", reason)

    def outdated(self, worker: Worker, held: str) -> None:
        """Take out a worker that answered with other weights than the current ones: it was restarted behind our back."""
        if worker.state == "ready":
            self._set(worker, "stale", f"holds the weights {held}")

    def _pick(self, preferred: Worker | None) -> Worker | None:
        free = [w for w in self.ready if w.inflight < self.config.concurrency] if self.gate_open else []
        if not free:
            return None
        worker = min(free, key=lambda w: w.inflight)
        if preferred in free and preferred is not None and preferred.inflight <= worker.inflight + AFFINITY:
            worker = preferred
        worker.inflight += 1
        return worker

    def release(self, worker: Worker) -> None:
        """Give a place back."""
        worker.inflight -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiters:
            place, preferred = self._waiters[0]
            if place.done():
                self._waiters.popleft()
            elif worker := self._pick(preferred):
                self._waiters.popleft()
                place.set_result(worker)
            else:
                return

    async def _watch_waiters(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            if self.ready or not self.gate_open or not self._waiters:
                self._ready_at = clock()
            elif clock() - self._ready_at > self.config.no_server_timeout_s:
                self._fail_waiters(self.no_server())
            await asyncio.sleep(0.2)

    def troubles(self) -> list[str]:
        """A line for each server that cannot be sampled from."""
        return [
            f"{w.url or f'server {w.index}'}: {w.state}, {w.reason}"
            + (f"; before that: {w.trouble}" if w.trouble not in ("", w.reason) else "")
            for w in self.workers
            if w.state != "ready"
        ]

    def no_server(self) -> UserError:
        """The error of a run without servers."""
        reasons = "\n".join(f"  {line}" for line in self.troubles())
        return UserError(
            "no SGLang server has been usable for "
            f"{self.config.no_server_timeout_s:g} s (rollout.sglang.no_server_timeout_s):\n{reasons}"
        )

    # ------------------------------------------------------------------ weights

    async def begin_update(self) -> list[Target]:
        """Stop sampling: no new requests, those under way aborted. Returns the servers that can take weights.

        Holds `updating` until `end_update`.
        """
        await self.updating.acquire()
        self.gate_open = False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timing.drain_s
        busy = [w for w in self.workers if w.requests]
        while busy and loop.time() < deadline:
            # Again and again: a request may have reached the server after the first abort.
            urls = {w.url for w in self.workers if w.state in ("ready", "suspect")}
            await asyncio.gather(*(self.client.abort(url, None) for url in urls), return_exceptions=True)
            if tasks := [task for w in busy for task in w.requests]:
                await asyncio.wait(tasks, timeout=1.0)
            busy = [w for w in self.workers if w.requests]
        for worker in busy:
            self._lose(worker, f"did not abort its requests within {self.timing.drain_s:g} s")
        return [w.target for w in self.workers if w.state in ("ready", "stale")]

    def end_update(
        self, tag: str | None, snapshot: Snapshot | None, done: list[Target], faults: dict[str, str]
    ) -> None:
        """Sampling goes on with the weights called `tag`, on the servers in `done`."""
        previous, self.snapshot, self.tag = self.snapshot, snapshot, tag
        if previous is not None and previous is not snapshot:
            previous.delete()
        urls = {target.url for target in done}
        for worker in self.workers:
            if worker.url in urls and worker.state in ("ready", "stale"):
                worker.tag = tag
                self._set(worker, "ready", "")
            elif fault := faults.get(worker.url):
                # Some of its tensors may be new, some old. Also where it is under examination already.
                worker.tag = None
                if worker.state in ("ready", "stale"):
                    worker.faults += 1
                    self._set(worker, "suspect", fault)
            elif worker.state == "ready":
                self._set(worker, "stale", "missed the update")
        self.gate_open = True
        self.updating.release()
        for worker in self.workers:
            worker.wake.set()
        self._dispatch()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[dict[str, str]]:
        """No sampling within; the weights stay. Servers for whose URL the dictionary names a fault get them again."""
        await self.begin_update()
        faults: dict[str, str] = {}
        try:
            yield faults
        finally:
            sound = [worker.target for worker in self.ready if not faults.get(worker.url)]
            self.end_update(self.tag, self.snapshot, sound, faults)

    async def wait_updated(self) -> None:
        """Wait until every worker that answers holds the current weights, and there is one.

        Raises:
            UserError: no server for no_server_timeout_s.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.no_server_timeout_s
        while not self.ready or any(w.state in ("stale", "suspect") for w in self.workers):
            if clock() > deadline and not self.ready:
                raise self.no_server()
            if self._failure is not None:
                raise self._failure
            await asyncio.sleep(0.05)

    async def _restore(self, worker: Worker) -> None:
        """Bring one worker to the current weights from the snapshot, and check it against another."""
        async with self.updating:
            if worker.state != "stale" or self.snapshot is None or self.tag is None:
                return
            transfer = Transfer(self.link, [worker.target], self.tag)
            for bucket in self.snapshot.buckets:
                await transfer.send(bucket)
            done = await transfer.end(self.snapshot)
            if not done:
                worker.faults += 1
                worker.tag = None
                self._set(worker, "suspect", transfer.faults[worker.url])
                return
            try:
                await self._check_against_peers(worker)
            except (ServerFault, Refused) as fault:
                worker.faults += 1
                self._set(worker, "suspect", str(fault))
                return
            worker.tag = self.tag
            self._set(worker, "ready", "")

    async def _check_against_peers(self, worker: Worker) -> None:
        """Compare a worker with the first ready one that answers. Where there is none, its own confirmation must do."""
        peers = [w for w in self.ready if w.ranks == worker.ranks]
        ours = await checksums(self.client, worker.url, self.timing.transfer_s) if peers else {}
        for peer in peers:
            try:
                question = checksums(self.client, peer.url, self.timing.transfer_s)
                theirs = await self.ask(peer, question, self.suspect)
            except ServerFault:
                continue
            if names := differing(ours, theirs):
                raise ServerFault(
                    f"{worker.url}: {len(names)} tensors differ from {peer.url}: {', '.join(names[:8])}"
                )
            return

    # ------------------------------------------------------------------ supervision

    def _set(self, worker: Worker, state: State, reason: str) -> None:
        if state != worker.state:
            level = logging.WARNING if state in ("down", "suspect") else logging.INFO
            log.log(level, "SGLang server %s: %s -> %s %s", worker.url, worker.state, state, reason)
        worker.state, worker.reason = state, reason
        if state in ("down", "suspect"):
            worker.trouble = reason
        worker.wake.set()
        self._dispatch()

    def _lose(self, worker: Worker, reason: str) -> None:
        self._set(worker, "down", reason)
        # Behind a router nobody knows which requests the lost server held.
        losers = self.workers if self.config.router else [worker]
        for task in [task for w in losers for task in w.requests]:
            task.cancel()

    async def _supervise(self, worker: Worker) -> None:
        step: dict[State, Callable[[Worker], Awaitable[None]]] = {
            "down": self._revive,
            "suspect": self._examine,
            "stale": self._refresh,
            "ready": self._watch,
        }
        while True:
            try:
                await step[worker.state](worker)
            except (ServerFault, Refused) as fault:
                worker.faults += 1
                if worker.state == "ready":
                    self._set(worker, "suspect", str(fault))
                else:
                    self._lose(worker, str(fault))

    async def _revive(self, worker: Worker) -> None:
        """Restart an owned server, or wait until a given one answers; ends in ready, stale or (again) down."""
        if worker.faults:
            await asyncio.sleep(
                min(self.timing.backoff_s * 2 ** (worker.faults - 1), self.timing.backoff_max_s)
            )
        if worker.owned:
            if worker.process is not None:
                await asyncio.to_thread(worker.process.end)
            assert self.launch is not None
            worker.process, worker.url = self.launch.server(worker.index)
            worker.tag = None
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.start_timeout_s
        while ailment := await self._ailment(worker):
            if not worker.owned or worker.ever_up:
                worker.reason = ailment  # of a server that is only starting its log says more
            if worker.process is not None and not worker.process.alive:
                raise ServerFault(
                    f"ended while starting; {worker.process.log} ends:\n{worker.process.tail(5)}"
                )
            if worker.owned and clock() > deadline:
                raise ServerFault(f"was not ready within {self.config.start_timeout_s:g} s")
            await asyncio.sleep(0.3)
        await self._admit(worker)
        worker.ever_up = True

    async def _ailment(self, worker: Worker) -> str:
        """Why a server that is out of use does not answer; "" if it does.

        One that an update left paused, this run's or another's, goes on.
        """
        try:
            await self.client.call(worker.url, "/continue_generation", {}, self.timing.health_timeout_s)
        except (ServerFault, Refused) as fault:
            return str(fault)
        well = await self.client.healthy(f"{worker.url}/health", self.timing.health_timeout_s)
        return "" if well else f"{worker.url}/health does not say that it is ready"

    async def _admit(self, worker: Worker) -> None:
        """Decide by the weights that a well server holds whether it may be sampled from."""
        info = await self.client.info(worker.url, self.timing.health_timeout_s)
        worker.ranks = info.tensor
        if self.tag is not None and info.weight_version == self.tag == worker.tag:
            self._set(worker, "ready", "")
        else:
            self._set(worker, "stale", f"holds the weights {info.weight_version}")

    async def _examine(self, worker: Worker) -> None:
        """A request failed: is the server well? Repeated faults of a server that says so count as well."""
        if worker.faults >= self.timing.health_failures:
            worker.faults = 1
            return self._lose(
                worker, f"failed {self.timing.health_failures} times in a row, at last: {worker.reason}"
            )
        for _ in range(self.timing.health_failures):
            if worker.process is not None and not worker.process.alive:
                return self._lose(worker, f"ended; {worker.process.log} ends:\n{worker.process.tail(5)}")
            if not await self._ailment(worker):
                await asyncio.sleep(self.timing.backoff_s * (worker.faults - 1))
                return await self._admit(worker)
            await asyncio.sleep(0.5)
        self._lose(worker, f"does not answer {worker.url}/health ({worker.reason})")

    async def _refresh(self, worker: Worker) -> None:
        if self.snapshot is None or self.updating.locked():
            await self._watch(worker)
        else:
            await self._restore(worker)

    async def _watch(self, worker: Worker) -> None:
        """Sleep until something happens or the next check is due; check."""
        worker.wake.clear()
        state = worker.state
        waited = 0.0
        while waited < self.timing.health_interval_s and not worker.wake.is_set():
            if worker.process is not None and not worker.process.alive:
                return self._lose(worker, f"ended; {worker.process.log} ends:\n{worker.process.tail(5)}")
            pause = min(0.5, self.timing.health_interval_s)
            try:
                await asyncio.wait_for(worker.wake.wait(), pause)
            except TimeoutError:
                waited += pause
        if worker.wake.is_set() or worker.state != state or not self.gate_open:
            return  # a paused server does not answer health checks
        if not await self.client.healthy(f"{worker.url}/health", self.timing.health_timeout_s):
            if self.gate_open and worker.state == state:
                self._set(worker, "suspect", "health check failed")
        elif state == "ready":
            held = (await self.client.info(worker.url, self.timing.health_timeout_s)).weight_version
            if held != self.tag and self.gate_open:
                self.outdated(worker, held)

    async def _keep_router(self) -> None:
        """Keep a router running over exactly the ready workers. While there is none, requests go straight to them."""
        assert self.launch is not None
        while True:
            wanted = frozenset(worker.url for worker in self.ready)
            if wanted and (self.router is None or self.router[2] != wanted or not self.router[0].alive):
                self.router_up = False
                if self.router is not None:
                    await asyncio.to_thread(self.router[0].end)
                self.router = (*self.launch.router(sorted(wanted)), wanted)
                log.info("sglang-router %s over %s", self.router[1], sorted(wanted))
            if self.router is not None and not self.router_up:
                self.router_up = await self.client.healthy(f"{self.router[1]}/readiness", 5.0)
            await asyncio.sleep(0.3)

    async def _watch_urls(self) -> None:
        """Follow the file, or the folder: new URLs are taken in, missing ones let go."""
        problem = ""
        while True:
            await asyncio.sleep(1.0)
            try:
                urls = await asyncio.to_thread(read_urls, self.config)
            except UserError as error:
                if str(error) != problem:
                    problem = str(error)
                    log.warning("the servers stay as they are: %s", problem)
                continue
            for worker in [w for w in self.workers if w.url not in urls]:
                self._tasks.pop(worker).cancel()
                self._lose(worker, "is no longer among the servers that are given")
                self.workers.remove(worker)
            for url in urls:
                if url not in {w.url for w in self.workers}:
                    self._add(url, owned=False)


def read_urls(config: SGLangConfig) -> list[str]:
    """The given servers' URLs, without trailing slashes or repetition.

    Raises:
        UserError: a line of urls_file, or an entry of urls, is no http URL; or there is none. A urls_dir may be empty:
            its servers come and go.
    """
    if config.urls_dir:
        return [server.url.rstrip("/") for server in registered(Path(config.urls_dir))]
    entries = [(f"rollout.sglang.urls[{i}]", url) for i, url in enumerate(config.urls)]
    if config.urls_file:
        try:
            lines = Path(config.urls_file).read_text().splitlines()
        except OSError as error:
            raise UserError(f"rollout.sglang.urls_file: {error}") from error
        entries += [
            (f"{config.urls_file}:{i}", line.strip())
            for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#")
        ]
    for where, url in entries:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{where}: {url!r} is not a server's URL; write http://host:port")
    urls = list(dict.fromkeys(url.rstrip("/") for _, url in entries))
    if not urls:
        raise UserError(f"{config.urls_file}: no URL of a server; write one a line")
    return urls
