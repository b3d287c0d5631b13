"""New weights for the servers: sampling stops, goes on, and a server that missed an update is brought to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.states import WHOLE, Timing, Worker
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot
from gtpo_megatron.rollout.sglang.weights.transfer import Link, Transfer
from gtpo_megatron.rollout.sglang.weights.verify import checksums, differing


class Updates:
    """Replaces the weights of a fleet's workers, one update or restoration at a time."""

    def __init__(
        self, fleet: Fleet, client: Client, link: Link, config: SGLangConfig, timing: Timing
    ) -> None:
        self.link = link
        self.snapshot: Snapshot | None = None
        self.lock = asyncio.Lock()
        self._fleet, self._client, self._config, self._timing = fleet, client, config, timing

    async def begin(self) -> list[Target]:
        """Stop sampling: no new requests, those under way aborted. Returns the servers that can take weights.

        Holds `lock` until `end`.
        """
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

    async def wait_updated(self) -> None:
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

    @property
    def can_restore(self) -> bool:
        """Whether there are weights to give, and no update under way."""
        return self.snapshot is not None and self._fleet.tag is not None and not self.lock.locked()

    async def restore(self, worker: Worker) -> None:
        """Bring one worker to the current weights from the snapshot, and check it against another."""
        fleet = self._fleet
        async with self.lock:
            if worker.state != "stale" or self.snapshot is None or fleet.tag is None:
                return
            worker.tag = None  # nothing that it says of itself counts until its tensors are known to be right
            transfer = Transfer(self.link, [worker.target], fleet.tag)
            for bucket in self.snapshot.buckets:
                await transfer.send(bucket)
            done = await transfer.end(self.snapshot)
            if not done:
                worker.faults += 1
                fleet.move(worker, "suspect", transfer.faults[worker.url])
                return
            try:
                await self._check_against_peers(worker)
            except (ServerFault, Refused) as fault:
                worker.faults += 1
                fleet.move(worker, "suspect", str(fault))
                return
            worker.tag = fleet.tag
            fleet.move(worker, "ready", "")

    async def _check_against_peers(self, worker: Worker) -> None:
        """Compare a worker with the first ready one that answers and holds the current weights.

        Where there is none, its own confirmation must do.
        """
        patience = self._timing.transfer_s
        peers = [w for w in self._fleet.ready if w.ranks == worker.ranks]
        ours = await checksums(self._client, worker.url, patience) if peers else {}
        for peer in peers:
            try:
                theirs, held = await self._fleet.ask(peer, self._testimony(peer), self._fleet.suspect)
            except ServerFault:
                continue
            if held != self._fleet.tag:
                self._fleet.outdated(peer, held)
                continue
            if names := differing(ours, theirs):
                raise ServerFault(
                    f"{worker.url}: {len(names)} tensors differ from {peer.url}: {', '.join(names[:8])}"
                )
            return

    async def _testimony(self, peer: Worker) -> tuple[dict[str, str], str]:
        """A worker's checksums, and the version that it held after them: it may have been restarted before."""
        sums = await checksums(self._client, peer.url, self._timing.transfer_s)
        return sums, (await self._client.info(peer.url, self._timing.control_s)).weight_version
