"""Servers without servers: a clock that jumps, a client whose answers follow a script, processes that never were."""

import asyncio
import base64
import pickle
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import NamedTensor
from gtpo_megatron.rollout.sglang.client import Refused, ServerFault, ServerInfo
from gtpo_megatron.rollout.sglang.servers.pool import Pool
from gtpo_megatron.rollout.sglang.servers.states import Timing, Worker
from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot, pack
from gtpo_megatron.rollout.sglang.weights.transfer import Link, Transfer

T = TypeVar("T")
Health = Literal["well", "erring", "hung", "dead"]
LATENCY_S = 0.01
ON_DISK = "what the checkpoint holds"
TIMING = Timing(
    health_interval_s=2.0,
    health_pause_s=0.5,
    health_timeout_s=4.0,
    drain_s=5.0,
    control_s=3.0,
    transfer_s=6.0,
)


class _Clock(selectors.DefaultSelector):
    """Passes the time that the loop would wait in no time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for something that nothing will bring about"
        self.now += max(0.0, timeout)
        return super().select(0)


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer whenever there is nothing to do. Threads' work is done at once."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Any, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        done.set_result(function(*args))
        return done


def in_fake_time(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, however long that takes on its clock."""
    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        return runner.run(coroutine)


@dataclass
class FakeServer:
    """What a server does and holds."""

    health: Health = "well"
    broken: dict[str, Health] = field(default_factory=dict)  # of single paths
    version: str = "default"
    held: str = ON_DISK  # the weights, written
    open_session: bool = False
    paused: bool = False
    ranks: int = 1
    received: str = ""
    memory: set[str] = field(default_factory=lambda: {"weights", "kv_cache"})
    misused: list[str] = field(default_factory=list)  # what it was asked for, and has not
    restart_after: str | None = None  # a path, once
    asked: list[tuple[float, str]] = field(default_factory=list)

    def restart(self) -> None:
        """Another process on the same port."""
        self.health, self.version, self.held = "well", "default", ON_DISK
        self.open_session = self.paused = False
        self.memory = {"weights", "kv_cache"}

    def needs(self, *parts: str) -> None:
        """What touches memory that was given up ends a server."""
        if not self.memory.issuperset(parts):
            self.health = "dead"
            self.misused += parts
            raise ServerFault("the server has ended: memory that it has not")


class ScriptedClient:
    """Speaks for the servers by URL as the real client would, in fake time."""

    def __init__(self, servers: dict[str, FakeServer]) -> None:
        self.servers = servers

    async def close(self) -> None:
        pass

    async def reach(self, url: str, path: str, timeout_s: float) -> FakeServer:
        """The server, if it answers this path."""
        server = self.servers[url]
        server.asked.append((asyncio.get_running_loop().time(), path))
        health = server.broken.get(path, server.health)
        if health == "hung":
            await asyncio.sleep(timeout_s)
            raise ServerFault(f"{url}{path}: no answer in {timeout_s:g} s")
        await asyncio.sleep(LATENCY_S)
        if health == "dead" or server.health == "dead":
            raise ServerFault(f"{url}{path}: connection refused")
        if health == "erring":
            raise ServerFault(f"{url}{path} answered 500")
        return server

    async def call(self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        server = await self.reach(url, path, timeout_s)
        if path == "/pause_generation":
            server.paused = True
        elif path == "/continue_generation":
            server.paused = False
        elif path == "/begin_weight_update":
            if server.open_session:
                raise Refused(f"{url}{path} refused the request (400): a session is open")
            server.open_session, server.received = True, ""
        elif path == "/update_weights_from_tensor":
            assert body is not None
            if not server.open_session:  # restarted since it was opened
                raise Refused(f"{url}{path} refused the request (400): no session is open")
            server.needs("weights")
            server.held = "of two versions"
            server.received += _unpickled(body["serialized_named_tensors"][0])
        elif path == "/end_weight_update":
            if not server.open_session:
                raise Refused(f"{url}{path} refused the request (400): no session is open")
            server.open_session = False
            if server.received:
                server.held, server.received = server.received, ""
        elif path == "/update_weight_version":
            assert body is not None
            server.version = body["new_version"]
        elif path == "/weights_checker":
            server.needs("weights")
            return {"ranks": [{"checksums": {"weight": server.held}}]}
        if path == server.restart_after:
            server.restart_after = None
            server.restart()
        return {}

    async def healthy(self, url: str, timeout_s: float) -> bool:
        server, _, path = url.rpartition("/")
        try:
            reached = await self.reach(server, f"/{path}", timeout_s)
            if not reached.paused:
                reached.needs("weights", "kv_cache")
            return not reached.paused
        except ServerFault:
            return False

    async def info(self, url: str, timeout_s: float = 30.0) -> ServerInfo:
        server = await self.reach(url, "/model_info", timeout_s)
        return ServerInfo(server.ranks, server.version)

    async def weight_version(self, url: str, timeout_s: float) -> str:
        return (await self.info(url, timeout_s)).weight_version

    async def abort(self, url: str, rid: str | None, timeout_s: float = 10.0) -> None:
        await self.reach(url, "/abort_request", timeout_s)

    async def release_memory(self, url: str, parts: list[str], timeout_s: float) -> None:
        server = await self.reach(url, "/release_memory_occupation", timeout_s)
        if not server.paused:
            server.needs("idleness")
        server.needs(*parts)
        server.memory -= set(parts)
        if "weights" in parts:
            server.held = "noise"

    async def resume_memory(self, url: str, parts: list[str], timeout_s: float) -> None:
        server = await self.reach(url, "/resume_memory_occupation", timeout_s)
        if server.memory & set(parts):
            server.needs("room for more")
        server.memory |= set(parts)

    async def generate(self, url: str, seconds: float = 0.1) -> str:
        """Whose weights a completion of so many seconds would be sampled with."""
        server = await self.reach(url, "/generate", 30.0)
        await asyncio.sleep(seconds)
        while server.paused and server.health != "dead":
            await asyncio.sleep(0.05)
        server.needs("weights", "kv_cache")
        if server.health == "dead":
            raise ServerFault(f"{url}/generate: connection reset")
        return server.version


@lru_cache
def _unpickled(payload: str) -> str:
    return written(pickle.loads(base64.b64decode(payload)))


def written(named: list[NamedTensor]) -> str:
    """Tensors as text, to be compared."""
    return "".join(f"{name}: {tensor.tolist()}; " for name, tensor in named)


@lru_cache
def _weights(version: int) -> list[NamedTensor]:
    return [(name, torch.full((2,), float(version))) for name in ("first", "second")]


@lru_cache
def _written_weights(version: int) -> str:
    return written(_weights(version))


@dataclass
class FakeProcess:
    """A process of a server that is started here."""

    server: FakeServer
    log: Path = Path("server.log")
    alive: bool = True
    popen: Any = field(default_factory=lambda: SimpleNamespace(terminate=lambda: None, wait=lambda _: None))

    def tail(self, lines: int = 15) -> str:
        return "the end of its log"

    def end(self) -> None:
        self.alive = False
        self.server.health = "dead"


@dataclass
class FakeLaunch:
    """Starts servers: each on a new port. `dying`: so many of the next ones end while they start."""

    servers: dict[str, FakeServer]
    dying: int = 0
    started: list[tuple[float, int]] = field(default_factory=list)
    processes: list[FakeProcess] = field(default_factory=list)

    def server(self, index: int) -> tuple[FakeProcess, str]:
        url = f"http://owned:{len(self.started)}"
        self.started.append((asyncio.get_running_loop().time(), index))
        self.servers[url] = FakeServer()
        process = FakeProcess(self.servers[url])
        if self.dying:
            self.dying -= 1
            process.end()
        self.processes.append(process)
        return process, url


class Rehearsal:
    """A pool over fake servers, given by URL, or (`owned`) started here."""

    def __init__(self, count: int, timing: Timing, owned: bool = False, **config: Any) -> None:
        urls = () if owned else tuple(f"http://given:{i}" for i in range(count))
        self.servers: dict[str, FakeServer] = {url: FakeServer() for url in urls}
        self.client: Any = ScriptedClient(self.servers)
        self.launch: Any = FakeLaunch(self.servers) if owned else None
        section = SGLangConfig(urls=urls, servers=count, **config)
        link = Link(self.client, "tensor", timing.control_s, timing.transfer_s, timing.collective_s)
        self.pool = Pool(section, self.launch, self.client, link, timing, sockets=1000)
        self.fleet = self.pool.fleet
        self.updates = self.pool.updates
        self.moves: list[tuple[str, str]] = []
        self._version = 0

    @property
    def states(self) -> list[str]:
        return [worker.state for worker in self.fleet.workers]

    def server(self, index: int) -> FakeServer:
        """What the worker of this number speaks to now."""
        return self.servers[self.fleet.workers[index].url]

    async def update(self) -> None:
        """What the engine does with new weights; the export is two tensors in two buckets."""
        self._version += 1
        tag = f"run:{self._version}"
        targets = await self.updates.begin()
        snapshot = Snapshot(self._version)
        transfer = Transfer(self.updates.link, targets, tag)
        for bucket in pack(_weights(self._version), 8):
            snapshot.add(bucket)
            await transfer.send(bucket)
        snapshot.finish()
        done = await transfer.end(snapshot)
        self.updates.end(tag, snapshot, done, transfer.faults)

    def holds_current(self, server: FakeServer) -> bool:
        """Whether a server's tensors are those that may be sampled from, whatever it says of its version."""
        assert self.fleet.tag is not None
        return server.held == _written_weights(int(self.fleet.tag.removeprefix("run:")))

    async def until(
        self, condition: Callable[[], bool], limit_s: float = 600.0, step_s: float = 0.01
    ) -> float:
        """Wait for a condition, looked at every `step_s`; the seconds that it took."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not condition():
            if self.fleet.failure is not None:
                raise self.fleet.failure
            assert loop.time() < begun + limit_s, self.states
            await asyncio.sleep(step_s)
        return loop.time() - begun

    async def all_ready(self, limit_s: float = 600.0) -> float:
        return await self.until(lambda: set(self.states) == {"ready"}, limit_s, 0.1)


@asynccontextmanager
async def rehearsal(
    count: int, timing: Timing, owned: bool = False, updated: bool = True, **config: Any
) -> AsyncIterator[Rehearsal]:
    """A started pool, by default with weights on every server; ended with the context, which must leave no failure."""
    running = Rehearsal(count, timing, owned, **config)
    await running.pool.start()
    try:
        if updated:
            await running.pool.wait_started()
            await running.update()
            await running.all_ready()
        yield running
        assert running.fleet.failure is None
    finally:
        await running.pool.close()


async def request(running: Rehearsal, preferred: Worker | None = None, seconds: float = 0.1) -> str:
    """One request, sent again until it is answered, as the sampler does."""
    while True:
        worker = await running.fleet.acquire(preferred, first=False)
        tag = running.fleet.tag
        try:
            version = await running.fleet.run(worker, lambda url: running.client.generate(url, seconds))
        except ServerFault:
            continue
        if version == tag:
            return version
        running.fleet.outdated(worker, version)


def check_sound(running: Rehearsal) -> None:
    """Whoever is sampled from holds the current weights, and no more requests than it may."""
    for worker in running.fleet.workers:
        assert 0 <= worker.inflight <= 4
        server = running.servers.get(worker.url)
        if worker.state == "ready" and running.fleet.gate_open and server.version == running.fleet.tag:
            assert running.holds_current(server), worker
            assert not server.paused


async def keep_checking(running: Rehearsal) -> None:
    """`check_sound` until it fails, or is cancelled."""
    while True:
        check_sound(running)
        await asyncio.sleep(0.25)
