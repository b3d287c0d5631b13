"""Weights to the servers, three ways: a process group (distributed), the request itself or CUDA IPC (tensor), files (disk).

One `Transfer` is one attempt to bring a set of servers to one version: begin, send each bucket, end. A server that
fails on the way is left out and named; the others are done when `end` returns them.
"""

import asyncio
import base64
import io
import pickle
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from gtpo_megatron.network import gloo_towards, is_loopback, own_address
from gtpo_megatron.rollout.sglang.buckets import Bucket, Snapshot
from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault

Method = Literal["distributed", "tensor", "disk"]
MOVES_WEIGHTS = (
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/end_weight_update",  # quantises
)


@dataclass(frozen=True)
class Target:
    """A server to be updated: its URL and its number of ranks."""

    url: str
    ranks: int


class Broadcast:
    """A process group of the trainer's process (rank 0) and all ranks of some servers.

    Made of a store and a backend of its own, so that the trainer's default group neither needs to exist nor sees it.
    The key prefixes are those of torch's helper, through which the servers join.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device, timeout_s: float) -> None:
        self.targets = tuple(targets)
        self.name = f"weights-{uuid.uuid4().hex[:8]}"
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.world_size = 1 + sum(target.ranks for target in targets)
        self.device = device
        self._timeout = timedelta(seconds=timeout_s)
        self.host = _own_address(targets)
        self._store = TCPStore(
            self.host, 0, self.world_size, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self.port = self._store.port
        self._group: Any = None

    def join(self) -> None:
        """Rank 0's part of the rendezvous; blocks until the servers have joined."""
        store: Store = PrefixStore(f"{self.name}/", PrefixStore(self.name, self._store))
        if self.backend == "nccl":
            from torch.distributed import ProcessGroupNCCL  # torch without CUDA lacks the name

            torch.cuda.set_device(self.device)
            options = ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group = ProcessGroupNCCL(PrefixStore("cuda/", store), 0, self.world_size, options)
        else:
            with gloo_towards(self.host):
                self._group = ProcessGroupGloo(
                    PrefixStore("cpu/", store), 0, self.world_size, timeout=self._timeout
                )

    def send(self, flat: torch.Tensor) -> None:
        """Broadcast one tensor; returns when it has left (gloo) or has been enqueued and finished (NCCL)."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        # Destroying a gloo group waits for its collectives: if `close` comes meanwhile, that must happen in this thread.
        group = self._group
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)
        group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def close(self) -> None:
        """Leave the group. A broadcast that hangs in another thread ends at its timeout (gloo) or at once (NCCL)."""
        if self._group is not None and hasattr(self._group, "abort"):
            self._group.abort()
        self._group = None
        del self._store


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
        await self._call(
            target, "/update_weight_version", {"new_version": self.tag, "abort_all_requests": False}
        )
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


class _StoragePickler(pickle._Pickler):
    """Writes torch's own name for what loads a storage's bytes.

    megatron-core from 0.19 on puts a stricter function of its own in that place, and pickle would write that one's name,
    which a server refuses and dies of. (The C pickler has no hook for the names of functions.)
    """

    def save_function(self, function: Any) -> None:
        if function is not torch.storage._load_from_bytes:
            return self.save_global(function)
        self.save("torch.storage")
        self.save("_load_from_bytes")
        self.write(pickle.STACK_GLOBAL)
        self.memoize(function)

    dispatch = pickle._Pickler.dispatch | {FunctionType: save_function}


def pickle_tensors(named: list[tuple[str, torch.Tensor]]) -> str:
    """Named tensors as SGLang's servers unpickle them, base64: CUDA tensors as IPC handles, CPU tensors as their bytes.

    torch could share CPU memory as well, but hands out file descriptors by a socket that a server cannot authenticate
    to (it dies), or files through a daemon that outlives the run.
    """
    buffer = io.BytesIO()
    if named[0][1].is_cuda:
        ForkingPickler(buffer).dump(named)
    else:  # a view would bring the whole bucket's bytes with it
        _StoragePickler(buffer).dump([(name, tensor.clone()) for name, tensor in named])
    return base64.b64encode(buffer.getvalue()).decode()


def _own_address(targets: Sequence[Target]) -> str:
    """The address of this machine by which the servers reach it. Raises UserError where there is no way to the first."""
    remote = [host for t in targets if not is_loopback(host := urlsplit(t.url).hostname or "")]
    if not remote:
        return "127.0.0.1"
    return own_address(remote[0])
