"""Where weights leave the trainer: a rank that sends its stage's buckets to servers, this process or another."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gtpo_megatron.rollout.sglang.weights.broadcast import Broadcast, Target

COLLECTIVE_S = 120.0  # time limit of one broadcast, and of joining its group


@dataclass(frozen=True)
class Opening:
    """A process group that servers are to join: what they have to be told."""

    name: str
    host: str
    port: int
    backend: str
    world_size: int


class Outlet(Protocol):
    """One sender, with at most one group of servers at a time. A failed call raises RuntimeError."""

    async def open(self, targets: Sequence[Target], device: str) -> Opening:
        """Make the group that these servers are to join, for tensors of this device."""
        ...

    async def join(self) -> None:
        """The sender's part of the rendezvous; ends when all have joined."""
        ...

    async def send(self, bucket: Any) -> None:
        """Broadcast a bucket of this outlet."""
        ...

    async def leave(self) -> None:
        """Give the group up; what hangs in it fails, or is left to its time limit."""
        ...


class LocalOutlet:
    """The sender in this process."""

    def __init__(self, collective_s: float) -> None:
        self._collective_s = collective_s
        self._broadcast: Broadcast | None = None
        self._thread = _thread()
        self._busy = False

    async def open(self, targets: Sequence[Target], device: str) -> Opening:
        made = Broadcast(targets, torch.device(device), self._collective_s)
        self._broadcast = made
        return Opening(made.name, made.host, made.port, made.backend, made.world_size)

    async def join(self) -> None:
        await self._in_thread("join")

    async def send(self, bucket: Any) -> None:
        await self._in_thread("send", bucket.flat)

    async def leave(self) -> None:
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None
        if self._busy:  # a thread that hangs in a collective is left to its time limit
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread, self._busy = _thread(), False

    def close(self) -> None:
        """Leave the group for good."""
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, method: str, *args: Any) -> None:
        broadcast, thread = self._broadcast, self._thread
        if broadcast is None:
            raise RuntimeError("the group was left")
        self._busy = True
        await asyncio.get_running_loop().run_in_executor(thread, getattr(broadcast, method), *args)
        if thread is self._thread:
            self._busy = False


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "sglang-weights")
