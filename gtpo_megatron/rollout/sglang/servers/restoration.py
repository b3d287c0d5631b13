"""Servers that missed an update are brought to the current weights: all that wait for it together, while others are sampled from."""

import asyncio
from collections.abc import Callable

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.states import Timing, Worker
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot
from gtpo_megatron.rollout.sglang.weights.transfer import Link, Transfer, complete
from gtpo_megatron.rollout.sglang.weights.verify import checksums, differing

Sums = dict[str, str]  # a server's checksums by tensor


class Restoration:
    """One round after the other, each a transfer from the kept copy to every stale worker that asked for it until then.

    No update waits for a round: one that is under way gives way between two buckets, and its workers get the update.

    Args:
        lock: held by whoever changes weights.
        copy: the kept copy of the current weights, if there is one.
    """

    def __init__(
        self,
        fleet: Fleet,
        client: Client,
        link: Link,
        lock: asyncio.Lock,
        copy: Callable[[], Snapshot | None],
        timing: Timing,
    ) -> None:
        self.stopped = False  # an update is under way
        self._fleet, self._client, self._link, self._timing = fleet, client, link, timing
        self._lock, self._copy = lock, copy
        self._waiting: set[Worker] = set()
        self._last = 0.0  # when the newest of them came
        self._round: asyncio.Task[None] | None = None
        self._sending = False

    @property
    def possible(self) -> bool:
        """Whether there are current weights to give, and no update under way."""
        return self._copy() is not None and self._fleet.tag is not None and not self.stopped

    async def bring(self, worker: Worker) -> None:
        """Bring a stale worker to the current weights, and compare it with another that holds them.

        It is ready afterwards, or under examination; or as stale as before, because an update came in between or it came too
        late for the round.
        """
        self._waiting.add(worker)
        self._last = asyncio.get_running_loop().time()
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._restore())
        current = self._round
        try:
            await asyncio.wait({current})
        finally:
            self._waiting.discard(worker)
        if not current.cancelled():
            current.result()

    async def stop(self) -> None:
        """No more rounds until `resume`. What is being sent of one ends with its bucket, or is cut after control_s."""
        self.stopped = True
        if self._round is not None and self._sending:
            await asyncio.wait({self._round}, timeout=self._timing.control_s)
        await self.close()

    async def close(self) -> None:
        """End a round under way at once."""
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait({self._round})

    def resume(self) -> None:
        """Rounds may begin again."""
        self.stopped = False

    async def _restore(self) -> None:
        await self._gathered()
        async with self._lock:
            snapshot, tag = self._copy(), self._fleet.tag
            workers = sorted((w for w in self._waiting if w.state == "stale"), key=lambda w: w.index)
            if self.stopped or snapshot is None or tag is None or not workers:
                return
            for worker in workers:
                worker.tag = (
                    None  # nothing that it says of itself counts until its tensors are known to be right
                )
            sent = await self._send(workers, snapshot, tag)
            if sent is None:
                return
            arrived, faults = {target.url for target in sent[0]}, sent[1]
            for worker in workers:
                if worker.url not in arrived:
                    self._fault(worker, faults.get(worker.url, "took no weights"))
            await self._admit([w for w in workers if w.url in arrived], tag)

    async def _gathered(self) -> None:
        """Wait for others that are about to come: restarted together, or dropped by one broken broadcast."""
        clock = asyncio.get_running_loop().time
        patience = self._timing.gather_s
        latest = clock() + 5 * patience
        while clock() < min(self._last + patience, latest):
            if all(w.state == "ready" or w in self._waiting for w in self._fleet.workers):
                return
            await asyncio.sleep(patience / 10)

    async def _send(
        self, workers: list[Worker], snapshot: Snapshot, tag: str
    ) -> tuple[list[Target], dict[str, str]] | None:
        """The servers that confirmed the version, and the faults of the others; None if an update came in between."""
        transfer = Transfer(self._link, [worker.target for worker in workers], tag)
        self._sending = True
        try:
            for bucket in snapshot.buckets:
                if self.stopped:
                    return None
                await transfer.send(bucket)
            return await complete(transfer, snapshot)
        except asyncio.CancelledError:
            await transfer.settle()
            for worker in workers:
                self._fault(
                    worker, f"had not taken weights {self._timing.control_s:g} s after an update began"
                )
            raise
        finally:
            self._sending = False

    async def _admit(self, workers: list[Worker], tag: str) -> None:
        """Those whose tensors are a ready server's may be sampled from; where none is ready, those of the first of them.

        Where there is none to compare it with, a worker's own confirmation must do.
        """
        others = [*self._fleet.ready, *workers]
        compared = [w for w in workers if any(o.ranks == w.ranks and o is not w for o in others)]
        found = await asyncio.gather(*map(self._sums, compared), return_exceptions=True)
        sums = dict(zip(compared, found, strict=True))
        witnesses: dict[int, tuple[str, Sums]] = {}  # by number of ranks, with the URL
        for worker in workers:
            ours = sums.get(worker, {})
            if isinstance(ours, (ServerFault, Refused)):
                self._fault(worker, str(ours))
                continue
            if isinstance(ours, BaseException):
                raise ours
            if worker in sums and worker.ranks not in witnesses:
                witnesses[worker.ranks] = await self._testimony(worker.ranks) or (worker.url, ours)
            witness, theirs = witnesses.get(worker.ranks, ("", ours))
            if names := differing(ours, theirs):
                what = f"{len(names)} tensors differ from {witness}: {', '.join(names[:8])}"
                self._fault(worker, f"{worker.url}: {what}")
            elif worker.state == "stale":
                worker.tag = tag
                self._fleet.move(worker, "ready", "")

    async def _testimony(self, ranks: int) -> tuple[str, Sums] | None:
        """URL and checksums of the first ready server of so many ranks that answers; None where there is none.

        One that was restarted behind our back, so that it holds other weights, is no witness.
        """
        for peer in [w for w in self._fleet.ready if w.ranks == ranks]:
            try:
                theirs, held = await self._fleet.ask(peer, self._sums_and_version(peer), self._fleet.suspect)
            except ServerFault:
                continue
            if held == self._fleet.tag:
                return peer.url, theirs
            self._fleet.outdated(peer, held)
        return None

    async def _sums(self, worker: Worker) -> Sums:
        return await checksums(self._client, worker.url, self._timing.transfer_s)

    async def _sums_and_version(self, peer: Worker) -> tuple[Sums, str]:
        """The version that it held after them: it may have been restarted before."""
        sums = await self._sums(peer)
        return sums, (await self._client.info(peer.url, self._timing.control_s)).weight_version

    def _fault(self, worker: Worker, fault: str) -> None:
        if worker.state == "stale":
            worker.faults += 1
            self._fleet.move(worker, "suspect", fault)
