"""Weights to the servers, three ways: a process group (distributed), the request itself or CUDA IPC (tensor), files (disk).

One `Transfer` is one attempt to bring a set of servers to one version: begin, send each bucket, end. A server that
fails on the way is left out and named; the others are done when `end` returns them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gtpo_megatron.rollout.sglang.client import Client, Refused, ServerFault
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, SharedBucket, Snapshot
from gtpo_megatron.rollout.sglang.weights.outlets import LocalOutlet, Opening, Outlet
from gtpo_megatron.rollout.sglang.weights.pickled import pickle_tensors
from gtpo_megatron.rollout.sglang.weights.stages import RemoteBucket

log = logging.getLogger(__name__)
Method = Literal["distributed", "tensor", "disk"]
MOVES_WEIGHTS = (
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/end_weight_update",  # quantises
)


@dataclass(frozen=True)
class Group:
    """The process group of one outlet with some servers."""

    targets: tuple[Target, ...]
    device: str
    opening: Opening


@dataclass
class Link:
    """What outlives one transfer: the client, this process's outlet, and the process groups of all outlets."""

    client: Client
    method: Method
    control_s: float  # of a call that moves no weights; short, because nothing is sampled while a hung server is awaited
    transfer_s: float  # of one that does
    collective_s: float  # of one broadcast, and of joining the group
    own: LocalOutlet = field(init=False)
    groups: dict[Outlet, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = LocalOutlet(self.collective_s)

    async def close(self) -> None:
        """Leave the process groups."""
        await self.drop_groups()
        self.own.close()

    async def drop_groups(self) -> None:
        """Close the process groups, if any, on both sides. A server that does not answer is passed over."""
        await asyncio.gather(*(self._drop_group(outlet) for outlet in list(self.groups)))

    async def _drop_group(self, outlet: Outlet) -> None:
        group = self.groups.pop(outlet)
        body = {"group_name": group.opening.name}
        await asyncio.gather(outlet.leave(), return_exceptions=True)
        calls = (self.client.call(t.url, "/destroy_weights_update_group", body, 10.0) for t in group.targets)
        await asyncio.gather(*calls, return_exceptions=True)

    async def group(self, outlet: Outlet, targets: Sequence[Target], device: str) -> Opening:
        """The outlet's process group with exactly these servers, made anew when they changed.

        Raises:
            ServerFault, Refused, RuntimeError: a server did not join.
        """
        group = self.groups.get(outlet)
        if group is not None and (group.targets, group.device) == (tuple(targets), device):
            return group.opening
        if group is not None:
            await self._drop_group(outlet)
        # A server that does not join would keep the rendezvous waiting for the whole of the timeout.
        new = await outlet.open(targets, device)
        self.groups[outlet] = Group(tuple(targets), device, new)
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
        await _all_or_first_fault([*calls, outlet.join()], outlet.leave)
        return new


class Transfer:
    """One attempt to bring `targets` to the version called `tag`. `faults` says which servers fell out, and why.

    Buckets may come from several outlets at once. A server takes one at a time, and all servers take them in the same
    order: two that each wait for the other's broadcast would wait for ever.
    """

    def __init__(self, link: Link, targets: Sequence[Target], tag: str) -> None:
        self.link = link
        self.tag = tag
        self.targets = list(targets)
        self.faults: dict[str, str] = {}
        self.broken: list[Target] = []  # those whose broadcast broke off, by whosever fault
        self._begun = False
        self._turn = asyncio.Lock()

    async def send(self, bucket: Bucket | RemoteBucket) -> None:
        """Send one bucket to all servers that are still in."""
        async with self._turn:
            await self._send(bucket)

    async def _send(self, bucket: Bucket | RemoteBucket) -> None:
        if self.link.method == "disk" or not self.targets:
            return
        if not self._begun:
            await self._begin()
        if not self.targets:
            return
        if self.link.method == "tensor":
            payloads = _payloads(bucket, self.targets)
            await self._each(
                lambda t: self._call(
                    t,
                    "/update_weights_from_tensor",
                    {"serialized_named_tensors": payloads[t], "flush_cache": False},
                )
            )
        else:
            await self._broadcast(bucket)

    async def settle(self) -> None:
        """Of a transfer that is given up: let what is being sent end, and leave the groups."""
        async with self._turn:
            await self.link.drop_groups()

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

    async def _broadcast(self, bucket: Bucket | RemoteBucket) -> None:
        """All servers or none: a broken broadcast leaves every server with some tensors of each version."""
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": [list(shape) for shape in bucket.shapes],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        outlet = bucket.outlet if isinstance(bucket, RemoteBucket) else self.link.own
        device = bucket.device if isinstance(bucket, RemoteBucket) else str(bucket.flat.device)
        try:
            group = await self.link.group(outlet, self.targets, device)
            calls: list[Awaitable[Any]] = [
                self._call(t, "/update_weights_from_distributed", body | {"group_name": group.name})
                for t in self.targets
            ]
            await _all_or_first_fault([*calls, outlet.send(bucket)], outlet.leave)
        except (ServerFault, Refused, RuntimeError) as error:
            await self.link.drop_groups()
            for target in self.targets:
                own = str(error).startswith(f"{target.url}/")  # the client's errors begin with the URL
                self.faults[target.url] = str(error) if own else f"weight broadcast broke off: {error}"
            self.broken, self.targets = self.targets, []

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


def _payloads(bucket: Bucket, targets: Sequence[Target]) -> dict[Target, list[str]]:
    """What each server's ranks unpickle, an entry each: a handle of what lies on their own GPU, or the same for all."""
    shared = bucket.handles if isinstance(bucket, SharedBucket) else {}
    if not shared:
        same = pickle_tensors(list(bucket.tensors()))
        return {target: [same] * target.ranks for target in targets}
    places = {target: range(target.first_gpu, target.first_gpu + target.ranks) for target in targets}
    return {target: [shared[gpu] for gpu in gpus] for target, gpus in places.items()}


async def complete(transfer: Transfer, snapshot: Snapshot) -> tuple[list[Target], dict[str, str]]:
    """End a transfer; one whose broadcast broke off is repeated once from the snapshot, without the guilty servers.

    Returns the servers that confirmed the version, and the faults of the others.
    """
    done = await transfer.end(snapshot)
    if not transfer.broken:
        return done, transfer.faults
    well = await asyncio.gather(*(_answers(transfer.link, target) for target in transfer.broken))
    rest = [target for target, answers in zip(transfer.broken, well, strict=True) if answers]
    if len(rest) == len(transfer.broken):
        # All live: then it is the one whose call failed first. (Where one has died, others fail of it, maybe before.)
        rest = [target for target in rest if not transfer.faults[target.url].startswith(f"{target.url}/")]
    log.warning(
        "the weights are sent again to %d of %d servers: %s",
        len(rest),
        len(transfer.broken),
        transfer.faults[transfer.broken[0].url],
    )
    again = Transfer(transfer.link, rest, transfer.tag)
    for bucket in snapshot.buckets:
        await again.send(bucket)
    done = await again.end(snapshot)
    confirmed = {target.url for target in done}
    faults = {url: fault for url, fault in transfer.faults.items() if url not in confirmed}
    return done, faults | again.faults


async def _answers(link: Link, target: Target) -> bool:
    # not /health: a server that is paused for an update does not answer it
    try:
        await link.client.info(target.url, link.control_s)
    except (ServerFault, Refused):
        return False
    return True


async def _all_or_first_fault(parts: list[Awaitable[Any]], on_fault: Callable[[], Awaitable[None]]) -> None:
    """Wait for all parts; at the first that fails call `on_fault`, which frees the others, and raise its error."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        await on_fault()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
