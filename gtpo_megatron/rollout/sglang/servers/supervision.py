"""What drives the states: a task for each worker, that revives, examines, refreshes or watches it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.sglang.client import Client, NoServer, Refused, ServerFault, ServerInfo
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.launch import Launch
from gtpo_megatron.rollout.sglang.servers.model import OtherModel, ServedModel
from gtpo_megatron.rollout.sglang.servers.states import WHOLE, State, Timing, Worker
from gtpo_megatron.rollout.sglang.servers.updates import Updates

DEATH_POLL_S = 0.5


class Supervision:
    """Watches over the workers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        updates: Updates,
        client: Client,
        launch: Launch | None,
        config: SGLangConfig,
        timing: Timing,
        model: ServedModel | None,
    ) -> None:
        self._fleet, self._updates, self._client = fleet, updates, client
        self._launch, self._config, self._timing = launch, config, timing
        self._model = model  # that servers must serve; None: whatever they do

    async def supervise(self, worker: Worker) -> None:
        """Do what the worker's state asks for, again and again. Never returns."""
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
                    self._fleet.move(worker, "suspect", str(fault))
                else:
                    self._fleet.lose(worker, str(fault))

    async def _revive(self, worker: Worker) -> None:
        """Restart an owned server, or wait until a given one answers; ends in ready, stale or (again) down.

        Where trainer and servers take turns, one is started only when the memory is the servers'.
        """
        if worker.process is not None:
            await asyncio.to_thread(worker.process.end)
        if worker.faults:
            await asyncio.sleep(
                min(self._timing.backoff_s * 2 ** (worker.faults - 1), self._timing.backoff_max_s)
            )
        if worker.owned:
            assert self._launch is not None
            while not self._fleet.allowed:
                await asyncio.sleep(0.2)
            worker.process, worker.url = self._launch.server(worker.index)
            worker.tag, worker.holds = None, WHOLE
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.start_timeout_s
        while ailment := await self._ailment(worker):
            if not worker.owned or worker.ever_up:
                worker.reason = ailment  # of a server that is only starting its log says more
            if worker.process is not None and not worker.process.alive:
                raise ServerFault(
                    f"ended while starting; {worker.process.log} ends:\n{worker.process.tail(5)}"
                )
            if worker.owned and clock() > deadline:
                raise ServerFault(f"was not ready within {self._config.start_timeout_s:g} s")
            await asyncio.sleep(0.3)
        await self._admit(worker)
        worker.ever_up = True

    async def _ailment(self, worker: Worker) -> str:
        """Why a server that is out of use does not answer; "" if it does.

        One that an update left paused, this run's or another's, goes on.
        """
        patience = self._timing.health_timeout_s
        worker.listens = True
        try:
            await self._client.call(worker.url, "/continue_generation", {}, patience)
        except (ServerFault, Refused) as fault:
            worker.listens = not isinstance(fault, NoServer)
            return str(fault)
        well = await self._client.healthy(f"{worker.url}/health", patience)
        return "" if well else f"{worker.url}/health does not say that it is ready"

    async def _admit(self, worker: Worker) -> None:
        """Decide by the weights that a well server holds whether it may be sampled from."""
        info = await self._fitting(worker)
        worker.ranks = info.tensor
        tag = self._fleet.tag
        if tag is not None and info.weight_version == tag == worker.tag:
            self._fleet.move(worker, "ready", "")
        else:
            self._fleet.move(worker, "stale", f"holds the weights {info.weight_version}")

    async def _fitting(self, worker: Worker) -> ServerInfo:
        """What a server says of itself, which must be that it serves the policy's model."""
        info = await self._client.info(worker.url, self._timing.health_timeout_s)
        worker.misfit = ""
        if self._model is not None:
            try:
                self._model.check(worker.url, info)
            except OtherModel as fault:
                worker.misfit = str(fault)
                raise
        return info

    async def _examine(self, worker: Worker) -> None:
        """A request failed: is the server well? Repeated faults of a server that says so count as well.

        One that has not all of its memory cannot be asked, for it would answer out of it.
        """
        if worker.holds != WHOLE:
            return self._fleet.lose(worker, worker.reason)
        patience = self._timing.health_failures
        if worker.faults >= patience:
            worker.faults = 1
            return self._fleet.lose(worker, f"failed {patience} times in a row, at last: {worker.reason}")
        for _ in range(patience):
            if worker.died:
                return self._fleet.lose(worker, worker.died)
            if not await self._ailment(worker):
                await asyncio.sleep(self._timing.backoff_s * (worker.faults - 1))
                return await self._admit(worker)
            await asyncio.sleep(0.5)
        self._fleet.lose(worker, f"does not answer {worker.url}/health ({worker.reason})")

    async def _refresh(self, worker: Worker) -> None:
        if self._updates.restoration.possible:
            await self._fitting(worker)  # it may be another process than the one that was admitted
            await self._updates.restoration.bring(worker)
        else:
            await self._watch(worker)

    async def _watch(self, worker: Worker) -> None:
        """Sleep until something happens; a process of our own may end without a word. `Health` asks how the server is."""
        worker.wake.clear()
        worker.idle = True
        try:
            while not worker.wake.is_set():
                if worker.died:
                    return self._fleet.lose(worker, worker.died)
                # wait_for swallows an end (Python 3.11) that comes with the event
                with suppress(TimeoutError):
                    async with asyncio.timeout(DEATH_POLL_S if worker.owned else None):
                        await worker.wake.wait()
        finally:
            worker.idle = False
