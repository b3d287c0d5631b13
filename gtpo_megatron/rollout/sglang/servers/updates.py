"""New weights for the servers: sampling stops, and goes on when enough of them have the weights."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.restoration import Restoration
from gtpo_megatron.rollout.sglang.servers.states import WHOLE, Timing
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot
from gtpo_megatron.rollout.sglang.weights.transfer import Link


class Updates:
    """Replaces the weights of a fleet's workers, one update or round of `restoration` at a time."""

    def __init__(
        self, fleet: Fleet, client: Client, link: Link, config: SGLangConfig, timing: Timing
    ) -> None:
        self.link = link
        self.snapshot: Snapshot | None = None
        self.lock = asyncio.Lock()
        self.restoration = Restoration(fleet, client, link, self.lock, lambda: self.snapshot, timing)
        self._fleet, self._client, self._config, self._timing = fleet, client, config, timing

    async def begin(self) -> list[Target]:
        """Stop sampling: no new requests, those under way aborted. Returns the servers that can take weights.

        Holds `lock` until `end`. Servers that are being restored are among them: the restoration gives way.
        """
        await self.restoration.stop()
        await self.lock.acquire()
        fleet = self._fleet
        fleet.gate_open = False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timing.drain_s
        busy = [w for w in fleet.workers if w.requests]
        while busy and loop.time() < deadline:
            # Again and again: a request may have reached the server after the first abort.
            urls = {w.url for w in fleet.workers if w.state in ("ready", "suspect")}
            await asyncio.gather(*(self._client.abort(url, None) for url in urls), return_exceptions=True)
            if tasks := [task for w in busy for task in w.requests]:
                await asyncio.wait(tasks, timeout=1.0)
            busy = [w for w in fleet.workers if w.requests]
        for worker in busy:
            fleet.lose(worker, f"did not abort its requests within {self._timing.drain_s:g} s")
        return [w.target for w in fleet.workers if w.state in ("ready", "stale")]

    def end(
        self, tag: str | None, snapshot: Snapshot | None, done: list[Target], faults: dict[str, str]
    ) -> None:
        """Sampling goes on with the weights called `tag`, on the servers in `done`."""
        fleet = self._fleet
        previous, self.snapshot, fleet.tag = self.snapshot, snapshot, tag
        if previous is not None and previous is not snapshot:
            previous.delete()
        urls = {target.url for target in done}
        for worker in fleet.workers:
            if worker.url in urls and worker.state in ("ready", "stale"):
                worker.tag = tag
                fleet.move(worker, "ready", "")
            elif fault := faults.get(worker.url):
                # Some of its tensors may be new, some old. Also where it is under examination already.
                worker.tag = None
                if worker.state in ("ready", "stale"):
                    worker.faults += 1
                    fleet.move(worker, "suspect", fault)
            elif worker.state == "ready":
                worker.tag = None  # it has some of the tensors of an update that was given up
                fleet.move(worker, "stale", "missed the update")
        fleet.gate_open = fleet.allowed == WHOLE
        self.lock.release()
        self.restoration.resume()
        for worker in fleet.workers:
            worker.wake.set()
        fleet.dispatch()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[dict[str, str]]:
        """No sampling within; the weights stay. Servers for whose URL the dictionary names a fault get them again."""
        await self.begin()
        faults: dict[str, str] = {}
        try:
            yield faults
        finally:
            sound = [worker.target for worker in self._fleet.ready if not faults.get(worker.url)]
            self.end(self._fleet.tag, self.snapshot, sound, faults)

    async def wait_for_quorum(self) -> None:
        """Wait until as many workers hold the current weights as rollout.sglang.quorum asks for; the others follow later.

        Raises:
            UserError: fewer for no_server_timeout_s.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.no_server_timeout_s
        fleet = self._fleet
        try:
            while fleet.note_shortage():
                if clock() > deadline:
                    raise fleet.no_server()
                if fleet.failure is not None:
                    raise fleet.failure
                await asyncio.sleep(0.05)
        finally:
            fleet.shortage = ""

    async def wait_settled(self) -> None:
        """Wait until every worker that answers holds the current weights, and there is one.

        Raises:
            UserError: no server for no_server_timeout_s.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.no_server_timeout_s
        fleet = self._fleet
        while not fleet.ready or any(w.state in ("stale", "suspect") for w in fleet.workers):
            if clock() > deadline and not fleet.ready:
                raise fleet.no_server()
            if fleet.failure is not None:
                raise fleet.failure
            await asyncio.sleep(0.05)
