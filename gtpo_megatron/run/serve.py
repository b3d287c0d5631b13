"""Servers for a run that goes on elsewhere: started on this machine, registered when they answer, kept, and taken back.

They end when they are told to (SIGTERM), or when their run does not go on: it is complete, or has a mistake.
"""

import asyncio
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import COMPLETE, MISTAKE, STOPPED, UserError
from gtpo_megatron.registry import BEAT_S, register, this_server, unregister
from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.servers.launch import Launch, Process, end_all, make_launch
from gtpo_megatron.run.directory import read_status

POLL_S = 1.0
HEALTH_S = 25.0  # SGLang's own check gives up after 20
STARTS = 2  # that may fail in a row: another process may have taken the port
ANYWHERE = "0.0.0.0"
log = logging.getLogger(__name__)


def serve(config: RunConfig, host: str, device: Literal["cpu", "cuda"], log_dir: Path) -> int:
    """Keep rollout.sglang.servers servers on this machine for the run of `config`, until they are told to end.

    Args:
        config: of the run, as it trains; its rollout.sglang.urls_dir is where they register.
        host: name or address by which the trainer reaches this machine.
        device: of the servers.
        log_dir: for the servers' logs.

    Returns:
        COMPLETE when the run is complete, STOPPED when a signal ended the servers.

    Raises:
        UserError: they cannot be started, see `make_launch`; or the run has ended with a mistake.
        RuntimeError: a server that was up has died, and could not be started again.
    """
    section = config.rollout.sglang
    if config.rollout.engine != "sglang" or not section.urls_dir:
        raise UserError(
            "serve: this recipe does not say where servers register: set rollout.engine=sglang and "
            "rollout.sglang.urls_dir=RUN_DIR/servers, here and in the run"
        )
    section = section.model_copy(update={"host": ANYWHERE, "first_gpu": section.first_gpu or 0})
    launch = make_launch(section, config.model.path, config.model.dtype, device, log_dir)
    keeper = _Keeper(launch, Path(section.urls_dir), host, config.path)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks ranks to stop, who need their servers until then
    return asyncio.run(keeper.run())


class _Keeper:
    """All servers of this machine."""

    def __init__(self, launch: Launch, folder: Path, host: str, run: Path) -> None:
        self._launch, self._folder, self._host, self._run = launch, folder, host, run
        self._processes: dict[int, Process] = {}
        self._began = time.time()

    async def run(self) -> int:
        told = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told.set)
        client = Client(self._launch.api_key, HEALTH_S)
        tasks = [asyncio.create_task(self._keep(n, client)) for n in range(self._launch.config.servers)]
        tasks += [asyncio.create_task(self._watch_run()), asyncio.create_task(_stopped(told))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # each takes its registration back
            end_all(list(self._processes.values()), 3.0)
            await client.close()
        return next(iter(done)).result()

    async def _keep(self, index: int, client: Client) -> int:
        """Start server `index`, again whenever it ends."""
        failures, ever_up = 0, False
        while True:
            if index in self._processes:
                self._processes[index].end()  # its children as well
            process, url = self._launch.server(index)
            self._processes[index] = process
            if await self._answers(process, url, client):
                failures, ever_up = 0, True
                await self._registered(process, url)
                log.warning(
                    "server %d ended; started again. %s ends:\n%s", index, process.log, process.tail(5)
                )
                continue
            failures += 1
            if failures >= STARTS:
                text = f"the SGLang server {index} did not start; {process.log} ends:\n{process.tail()}"
                raise RuntimeError(text) if ever_up else UserError(text)

    async def _answers(self, process: Process, url: str, client: Client) -> bool:
        """Wait until a server answers. False if it has ended, or did not within rollout.sglang.start_timeout_s."""
        deadline = time.monotonic() + self._launch.config.start_timeout_s
        while process.alive and time.monotonic() < deadline:
            if await client.healthy(f"{url}/health", HEALTH_S):
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def _registered(self, process: Process, url: str) -> None:
        """Stand in the folder as long as the process lives."""
        server = this_server(f"http://{self._host}:{urlsplit(url).port}")
        try:
            beaten = -BEAT_S
            log.info("server %s is up", server.url)
            while process.alive:
                if time.monotonic() - beaten >= BEAT_S:
                    register(self._folder, replace(server, heartbeat=time.time()))
                    beaten = time.monotonic()
                await asyncio.sleep(POLL_S)
        finally:
            unregister(self._folder, server)

    async def _watch_run(self) -> int:
        """Wait until the run has ended for good, since this began."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                status = read_status(self._run)
            except UserError:  # not begun
                continue
            if status.heartbeat < self._began:
                continue
            if status.exit_code == COMPLETE:
                return COMPLETE
            if status.exit_code == MISTAKE:
                raise UserError(f"the run {self._run} has ended, so its servers do: {status.message}")


async def _stopped(told: asyncio.Event) -> int:
    await told.wait()
    return STOPPED
