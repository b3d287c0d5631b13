"""sglang-router before the servers: one process for the whole run, told which of them are ready."""

import asyncio
import logging
from collections.abc import Callable

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.launch import Launch, Process

log = logging.getLogger(__name__)
ASK_AGAIN_S = 10.0  # a server that the router was told of, and does not show


class Router:
    """The router's process. While it is not up, requests go straight to the workers.

    A worker that is taken from it finishes the requests that it has; those of one that has died fail, and no others.
    """

    def __init__(self, launch: Launch, client: Client) -> None:
        self.process: Process | None = None
        self._launch, self._client = launch, client
        self._url = ""
        self._told: dict[str, float] = {}  # when, of the URLs that it does not show yet
        self._up = False

    @property
    def url(self) -> str | None:
        """Where requests go now; None while it is not up."""
        return self._url if self._up else None

    def doubt(self) -> None:
        """Until it answers, and has no worker that is not ready, requests go straight to the workers."""
        self._up = False

    async def keep(self, ready: Callable[[], frozenset[str]]) -> None:
        """Keep it running before exactly the workers whose URLs `ready` gives. Never returns."""
        while True:
            if self.process is not None and self.process.alive:
                try:
                    shown = await self._follow(ready())
                    self._up = bool(shown) and shown <= ready()  # which may have changed meanwhile
                except (ServerFault, Refused) as fault:
                    self._up = False
                    log.debug("sglang-router: %s", fault)
            elif ready():
                self._up = False
                if self.process is not None:
                    await asyncio.to_thread(self.process.end)  # what is left of its group
                self.process, self._url = self._launch.router()
                self._told.clear()
                log.info("sglang-router %s", self._url)
            await asyncio.sleep(0.3)

    async def _follow(self, wanted: frozenset[str]) -> frozenset[str]:
        """Tell it of workers that have come and gone; those that it had."""
        now = asyncio.get_running_loop().time()
        shown = await self._client.router_workers(self._url)
        for url, identity in shown.items():
            self._told.pop(url, None)
            if url not in wanted:
                await self._client.remove_worker(self._url, identity)
        for url in wanted - shown.keys():
            if now - self._told.get(url, -ASK_AGAIN_S) >= ASK_AGAIN_S:
                self._told[url] = now
                await self._client.add_worker(self._url, url)
        return frozenset(shown)
