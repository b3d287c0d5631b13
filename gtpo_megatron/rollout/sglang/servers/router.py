"""sglang-router before the servers, kept over exactly those that are ready."""

import asyncio
import logging
from collections.abc import Callable

from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.servers.launch import Launch, Process

log = logging.getLogger(__name__)


class Router:
    """The router's process. While it is not up, requests go straight to the workers."""

    def __init__(self, launch: Launch, client: Client) -> None:
        self.process: Process | None = None
        self._launch, self._client = launch, client
        self._url = ""
        self._over: frozenset[str] = frozenset()
        self._up = False

    @property
    def url(self) -> str | None:
        """Where requests go now; None while it is not up."""
        return self._url if self._up else None

    def failed(self) -> None:
        """Until it proves well, requests go straight to the workers."""
        self._up = False

    async def keep(self, ready: Callable[[], frozenset[str]]) -> None:
        """Keep it running over the workers whose URLs `ready` gives. Never returns."""
        while True:
            wanted = ready()
            if wanted and (self.process is None or self._over != wanted or not self.process.alive):
                self._up = False
                if self.process is not None:
                    await asyncio.to_thread(self.process.end)
                self.process, self._url = self._launch.router(sorted(wanted))
                self._over = wanted
                log.info("sglang-router %s over %s", self._url, sorted(wanted))
            if self.process is not None and not self._up:
                self._up = await self._client.healthy(f"{self._url}/readiness", 5.0)
            await asyncio.sleep(0.3)
