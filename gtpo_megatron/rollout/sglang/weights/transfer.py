"""Weights to the servers, three ways: a process group (distributed), the request itself or CUDA IPC (tensor), files (disk).

One `Transfer` is one attempt to bring a set of servers to one version: begin, send each bucket, end. A server that
fails on the way is left out and named; the others are done when `end` returns them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.weights.broadcast import Broadcast, Target
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, Snapshot
from gtpo_megatron.rollout.sglang.weights.pickled import pickle_tensors

Method = Literal["distributed", "tensor", "disk"]
MOVES_WEIGHTS = (
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/end_weight_update",  # quantises
)


@dataclass
class Link:
    """What outlives one transfer: the client, the process group, and the thread that broadcasts."""

    client: Client
    method: Method
    control_s: float  # of a call that moves no weights; short, because nothing is sampled while a hung server is awaited
    transfer_s: float  # of one that does
    collective_s: float  # of one broadcast, and of joining the group
    broadcast: Broadcast | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sglang-weights"))

    async def close(self) -> None:
        """Leave the process group."""
        await self.drop_group()
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def drop_group(self) -> None:
        """Close the process group, if any, on both sides. A server that does not answer is passed over."""
        if self.broadcast is None:
            return
        old, self.broadcast = self.broadcast, None
        old.close()
        body = {"group_name": old.name}
        calls = (self.client.call(t.url, "/destroy_weights_update_group", body, 10.0) for t in old.targets)
        await asyncio.gather(*calls, return_exceptions=True)

    async def group(self, targets: Sequence[Target], device: torch.device) -> Broadcast:
        """The process group with exactly these servers, made anew when they changed.

        Raises:
            ServerFault, Refused, RuntimeError: a server did not join.
        """
        if self.broadcast is not None and self.broadcast.targets == tuple(targets):
            return self.broadcast
        await self.drop_group()
        # A server that does not join would keep the rendezvous waiting for the whole of the timeout.
        new = Broadcast(targets, device, self.collective_s)
        offset, calls = 1, []
        for target in targets:
            body = {"master_address": new.host, "master_port": new.port, "rank_offset": offset}
            body |= {"world_size": new.world_size, "group_name": new.name, "backend": new.backend}
            calls.append(
                self.client.call(
                    target.url, "/init_weights_update_group", body, self.control_s + self.collective_s
                )
            )
            offset += target.ranks
        self.broadcast = new
        joined = asyncio.get_running_loop().run_in_executor(self.thread, new.join)
        await _all_or_first_fault([*calls, joined], self.replace_thread)
        return new

    def replace_thread(self) -> None:
        """Leave a thread that hangs in a collective to its timeout, and go on with another."""
        if self.broadcast is not None:
            self.broadcast.close()
            self.broadcast = None
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.thread = ThreadPoolExecutor(1, "sglang-weights")


class Transfer:
    """One attempt to bring `targets` to the version called `tag`. `faults` says which servers fell out, and why."""

    def __init__(self, link: Link, targets: Sequence[Target], tag: str) -> None:
        self.link = link
        self.tag = tag
        self.targets = list(targets)
        self.faults: dict[str, str] = {}
        self._begun = False

    async def send(self, bucket: Bucket) -> None:
        """Send one bucket to all servers that are still in."""
        if self.link.method == "disk" or not self.targets:
            return
        if not self._begun:
            await self._begin()
        if not self.targets:
            return
        if self.link.method == "tensor":
            # Every rank of a server unpickles an entry of its own.
            payload = pickle_tensors(list(bucket.tensors()))
            await self._each(
                lambda t: self._call(
                    t,
                    "/update_weights_from_tensor",
                    {"serialized_named_tensors": [payload] * t.ranks, "flush_cache": False},
                )
            )
        else:
            await self._broadcast(bucket)

    async def end(self, snapshot: Snapshot) -> list[Target]:
        """Finish, and return the servers that confirmed the version. Generation goes on there."""
        if self.link.method == "disk":
            await self._each(self._pause)
            body = {"model_path": str(snapshot.directory), "weight_version": self.tag, "flush_cache": True}
            await self._each(lambda t: self._call(t, "/update_weights_from_disk", body))
        elif self._begun:
            # The name within the session: a server that is restarted before its end refuses the end, after it has lost
            # the name. Given after the end, the name could go to another process than the one that took the tensors.
            name = {"new_version": self.tag, "abort_all_requests": False}
            await self._each(lambda t: self._call(t, "/update_weight_version", name))
            await self._each(lambda t: self._call(t, "/end_weight_update", {}))
        await self._each(self._confirm)
        return self.targets

    async def _begin(self) -> None:
        self._begun = True
        await self._each(self._pause)
        await self._each(self._open_session)

    async def _pause(self, target: Target) -> None:
        # After an in_place pause the first token credited to the new version would still be the old weights'.
        await self._call(target, "/pause_generation", {"mode": "retract"})

    async def _open_session(self, target: Target) -> None:
        try:
            await self._call(target, "/begin_weight_update", {})
        except Refused:  # the session of an attempt that broke off is still open
            await self._call(target, "/end_weight_update", {})
            await self._call(target, "/begin_weight_update", {})

    async def _confirm(self, target: Target) -> None:
        """Go on, and see that it is still the process that was given the name with the tensors."""
        await self._call(target, "/flush_cache?timeout=30", {})
        await self._call(target, "/continue_generation", {})
        held = (await self.link.client.info(target.url)).weight_version
        if held != self.tag:
            raise ServerFault(
                f"{target.url}/model_info: weight_version is {held} after an update to {self.tag}"
            )

    async def _broadcast(self, bucket: Bucket) -> None:
        """All servers or none: a broken broadcast leaves every server with some tensors of each version."""
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": [list(shape) for shape in bucket.shapes],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        try:
            group = await self.link.group(self.targets, bucket.flat.device)
            calls: list[Awaitable[Any]] = [
                self._call(t, "/update_weights_from_distributed", body | {"group_name": group.name})
                for t in self.targets
            ]
            sent = asyncio.get_running_loop().run_in_executor(self.link.thread, group.send, bucket.flat)
            await _all_or_first_fault([*calls, sent], self.link.replace_thread)
        except (ServerFault, Refused, RuntimeError) as error:
            await self.link.drop_group()
            self.faults |= {target.url: f"weight broadcast broke off: {error}" for target in self.targets}
            self.targets = []

    async def _call(self, target: Target, path: str, body: dict[str, Any]) -> Any:
        timeout_s = self.link.transfer_s if path in MOVES_WEIGHTS else self.link.control_s
        return await self.link.client.call(target.url, path, body, timeout_s)

    async def _each(self, call: Callable[[Target], Awaitable[Any]]) -> None:
        """Call every server at once; those that fail are left out from here on."""
        results = await asyncio.gather(*(call(target) for target in self.targets), return_exceptions=True)
        kept = []
        for target, result in zip(self.targets, results, strict=True):
            if isinstance(result, (ServerFault, Refused)):
                self.faults[target.url] = str(result)
            elif isinstance(result, BaseException):
                raise result
            else:
                kept.append(target)
        self.targets = kept


async def _all_or_first_fault(parts: list[Awaitable[Any]], on_fault: Callable[[], None]) -> None:
    """Wait for all parts; at the first that fails call `on_fault`, which frees the others, and raise its error."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        on_fault()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
