"""Whether servers that nobody hears from are well: one after the other, at a pace that does not grow with their number."""

import asyncio

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.states import State, Timing, Worker


class Health:
    """Asks the servers of a fleet.

    An answered request says that a server is well and which weights it holds, so only one that has been silent for
    health_interval_s is asked, the longest silent first, and none sooner than health_pause_s after another.
    """

    def __init__(self, fleet: Fleet, client: Client, timing: Timing) -> None:
        self._fleet, self._client, self._timing = fleet, client, timing

    async def watch(self) -> None:
        """Ask them. Never returns."""
        clock = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as checks:  # one that hangs keeps no other waiting
            while True:
                await asyncio.sleep(self._timing.health_pause_s)
                silent = [w for w in self._fleet.workers if self._may_be_asked(w)]
                worker = min(silent, key=lambda w: w.heard_at, default=None)
                if worker is not None and clock() - worker.heard_at >= self._timing.health_interval_s:
                    worker.heard_at = clock()
                    checks.create_task(self._check(worker, worker.state))

    def _may_be_asked(self, worker: Worker) -> bool:
        """Whether it would answer: a paused server does not."""
        return self._fleet.gate_open and worker.idle and not worker.checking

    async def _check(self, worker: Worker, state: State) -> None:
        """Ask a worker for its health and, if it is sampled from, for its weights; take it out if an answer is not good.

        Nothing follows for one that is in that state no longer: a task begins a moment after it was made.
        """
        fleet, patience = self._fleet, self._timing.health_timeout_s
        worker.checking = True
        try:
            well = await self._client.healthy(f"{worker.url}/health", patience)
        finally:
            worker.checking = False
        if not fleet.gate_open or worker.state != state:
            return
        if not well:
            return fleet.move(worker, "suspect", "health check failed")
        if state == "stale":
            return
        try:
            held = await self._client.weight_version(worker.url, patience)
        except (ServerFault, Refused) as fault:
            return fleet.suspect(worker, str(fault))
        if held != fleet.tag and fleet.gate_open:
            fleet.outdated(worker, held)
