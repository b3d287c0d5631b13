"""The servers of a run, put together: the fleet, its updates, the tasks that watch over it, and its start and end.

All of this runs in one event loop; nothing here may be called from another thread.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.health import Health
from gtpo_megatron.rollout.sglang.servers.launch import Launch, end_all, first_gpu
from gtpo_megatron.rollout.sglang.servers.model import ServedModel
from gtpo_megatron.rollout.sglang.servers.occupation import Occupation
from gtpo_megatron.rollout.sglang.servers.router import Router
from gtpo_megatron.rollout.sglang.servers.states import Timing, Worker
from gtpo_megatron.rollout.sglang.servers.supervision import Supervision
from gtpo_megatron.rollout.sglang.servers.updates import Updates
from gtpo_megatron.rollout.sglang.servers.urls import follow_urls, read_urls
from gtpo_megatron.rollout.sglang.weights.transfer import Link

START_ATTEMPTS = 2  # of a server's first start: another process may have taken its port


class Pool:
    """All servers of a run, and what keeps them."""

    def __init__(
        self,
        config: SGLangConfig,
        launch: Launch | None,
        client: Client,
        link: Link,
        timing: Timing,
        sockets: int,
        model: ServedModel | None = None,
    ) -> None:
        self.config = config
        self.timing = timing
        self.client = client
        self.router = Router(launch, client) if config.router and launch is not None else None
        self.fleet = Fleet(config, self.router, sockets)
        self.updates = Updates(self.fleet, client, link, config, timing)
        self.occupation = Occupation(self.fleet, self.updates, client, timing)
        self._supervision = Supervision(self.fleet, self.updates, client, launch, config, timing, model)
        self._health = Health(self.fleet, client, timing)
        self._tasks: dict[object, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Start or find the servers, and everything that watches over them. Does not wait for them."""
        if self.config.given:
            for url in read_urls(self.config):
                self._add(url, owned=False)
        else:
            for _ in range(self.config.servers):
                self._add("", owned=True)
        self._spawn("waiters", self.fleet.watch_waiters())
        self._spawn("health", self._health.watch())
        if self.config.urls_file or self.config.urls_dir:
            self._spawn("urls", self._follow_urls())
        if self.router is not None:
            self._spawn("router", self.router.keep(self.fleet.ready_urls))

    async def wait_started(self) -> None:
        """Wait until every server answers; of those that register themselves, until one does.

        Raises:
            UserError: a server serves another model, ended twice, or did not answer within start_timeout_s; with the end of its
                log.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.start_timeout_s
        while (waiting := [w for w in self.fleet.workers if not w.ever_up]) or not self.fleet.workers:
            if self.fleet.failure is not None:
                raise self.fleet.failure
            if misfits := [w.misfit for w in waiting if w.misfit]:
                raise UserError("\n".join(misfits))
            if self.config.urls_dir and len(waiting) < len(self.fleet.workers):
                return
            if not waiting and clock() > deadline:
                raise UserError(
                    f"no SGLang server has registered itself in {self.config.urls_dir} for "
                    f"{self.config.start_timeout_s:g} s (rollout.sglang.start_timeout_s)"
                )
            failed = [w for w in waiting if w.owned and w.faults >= START_ATTEMPTS]
            if failed or (waiting and clock() > deadline):
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
        await self.updates.restoration.close()
        await self.updates.link.close()
        processes = [w.process for w in self.fleet.workers if w.process]
        if self.router is not None and self.router.process is not None:
            processes.append(self.router.process)
        end_all(processes, 3.0)  # blocks: at the interpreter's exit there are no more threads to be had
        await self.client.close()

    def _add(self, url: str, owned: bool) -> None:
        index = len(self.fleet.workers)
        worker = Worker(index, url, owned, first_gpu=first_gpu(self.config, index) if owned else None)
        self.fleet.workers.append(worker)
        self._spawn(worker, self._supervision.supervise(worker))

    def _spawn(self, key: object, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._on_end)
        self._tasks[key] = task

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """None of the pool's tasks ends by itself: a mistake in one must reach the run, not wait for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fleet.fail(error)

    async def _follow_urls(self) -> None:
        """New URLs are taken in, missing ones let go."""
        fleet = self.fleet
        async for urls in follow_urls(self.config):
            for worker in [w for w in fleet.workers if w.url not in urls]:
                self._tasks.pop(worker).cancel()
                fleet.lose(worker, "is no longer among the servers that are given")
                fleet.workers.remove(worker)
            for url in urls:
                if url not in {w.url for w in fleet.workers}:
                    self._add(url, owned=False)
