"""Whose the GPUs' memory is, where servers and the trainer's ranks share them: given up before training, taken again after.

    release_memory    before training: weights and cache of keys and values, of all servers
    resume_weights    before an update: room for the weights, whose content is gone
    resume_cache      after it: room for keys and values; sampling goes on

SGLang ends a server that is asked to give up what it uses or has given up, or to take what it has. So nothing of a server
is asked but what it is known to hold; where a call fails, that is not known any more, and the server is ended. It is started
again when the memory is the servers' (`Fleet.allowed`): at the latest before the next update, for which it may be late.
"""

import asyncio
import logging

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.states import WHOLE, Part, Timing, Worker
from gtpo_megatron.rollout.sglang.servers.updates import Updates

log = logging.getLogger(__name__)
NOTHING: frozenset[Part] = frozenset()


class Occupation:
    """Takes the fleet's memory away and gives it back. Of servers that were started here alone."""

    def __init__(self, fleet: Fleet, updates: Updates, client: Client, timing: Timing) -> None:
        self._fleet, self._updates, self._client, self._timing = fleet, updates, client, timing

    async def release_memory(self) -> None:
        """Stop sampling, and let every server give up its memory: none holds any when this returns. Their weights are gone.

        A server that is being started, examined or brought to the current weights is waited for: it cannot be stopped half way.
        """
        fleet = self._fleet
        # from here on none is started, none is asked for its health
        fleet.allowed, fleet.gate_open = NOTHING, False
        await self._updates.begin()
        try:
            while holders := [worker for worker in fleet.workers if _occupies(worker)]:
                able = [w for w in holders if w.state in ("ready", "stale") and not w.checking]
                await asyncio.gather(*map(self._release, able))
                await asyncio.sleep(0.05)
        finally:
            # nobody holds weights that may be sampled from; the copy of them is kept for its memory alone
            self._updates.end(None, self._updates.snapshot, [], {})

    async def resume_weights(self) -> None:
        """Let the servers take room for weights. One that is down is started from here on, with all of its memory."""
        await self._resume(NOTHING, "weights")
        self._fleet.allowed = frozenset({"weights"})

    async def resume_cache(self) -> None:
        """Let the servers take room for keys and values, and sampling go on."""
        fleet = self._fleet
        await self._resume(frozenset({"weights"}), "kv_cache")
        fleet.allowed = WHOLE
        fleet.gate_open = fleet.tag is not None
        for worker in fleet.workers:
            worker.wake.set()
        fleet.dispatch()

    async def _release(self, worker: Worker) -> None:
        patience = self._timing.control_s
        try:
            # Out of its queue as well: what was left there would be sampled when the server goes on, without a cache.
            await self._client.call(worker.url, "/pause_generation", {"mode": "retract"}, patience)
            await self._client.abort(worker.url, None, patience)
            await self._client.release_memory(worker.url, sorted(worker.holds), patience)
        except (ServerFault, Refused) as fault:
            await self._end(worker, str(fault))
        else:
            worker.holds = NOTHING

    async def _resume(self, held: frozenset[Part], part: Part) -> None:
        """Give `part` to all workers that hold just `held`."""

        async def resume(worker: Worker) -> None:
            try:
                await self._client.resume_memory(worker.url, [part], self._timing.control_s)
            except (ServerFault, Refused) as fault:
                await self._end(worker, str(fault))
            else:
                worker.holds |= {part}

        able = [w for w in self._fleet.workers if w.holds == held and w.state != "down"]
        await asyncio.gather(*map(resume, able))

    async def _end(self, worker: Worker, fault: str) -> None:
        """What a server holds is not known: it may hold nothing when the trainer takes the memory."""
        if worker.process is not None:
            await asyncio.to_thread(worker.process.end)
        worker.faults += 1
        if worker.state != "down":
            self._fleet.lose(worker, fault)


def _occupies(worker: Worker) -> bool:
    """Whether a worker holds memory, as far as can be known: also while it starts, or waits for its end."""
    if worker.state == "down":
        return worker.process is not None and worker.process.alive
    return bool(worker.holds)
