"""Do the nodes of a job reach each other? Asked by the screening (gtpo_megatron/machine/screen.py), on all nodes at once.

They meet at a store on the job's first node, as the ranks will, and learn there who has come. Then each sends to every other over
the interface that gloo is to take, all at the same time, so that a node that does not answer delays none of the others; and each
sums with two neighbours, one after the other, by the library that trains: NCCL on GPUs, else gloo. Pairs that fail are named one
by one; which of the two is at fault shows in who else does not reach it, and slurm/lib.sh decides that.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from gtpo_megatron.network import GLOO_INTERFACE, gloo_towards, is_loopback, own_address

if TYPE_CHECKING:
    import torch

PATIENCE_S = 120.0  # for nodes that come later than others: a file system may take so long to load torch
CONNECT_S = 10.0  # for one connection to the first node
AT_ONCE = 64  # connections that a node makes at a time
PAYLOAD = os.urandom(1 << 16)  # more than a packet, of any size that networks have
POLL_S = 0.1
ROSTER, ARRIVED, CAME, PINGED, LEFT = "roster", "arrived", "came", "pinged", "left"


@dataclass(frozen=True)
class Broken:
    """A node that this one does not reach, and why."""

    peer: str
    why: str


@dataclass(frozen=True)
class Place:
    """Where a node is reached by others."""

    node: str
    host: str
    port: int


@dataclass(frozen=True)
class Meeting:
    """Where and how the nodes of a job meet, as this node sees it."""

    host: str  # the first node, which keeps the store
    port: int
    count: int  # of nodes that should come
    node: str  # this one
    patience_s: float = PATIENCE_S

    @property
    def presides(self) -> bool:
        return self.node == self.host

    def open(self, bounded: "Bounded") -> "torch.distributed.Store":
        """The store: made here by the first node, found by the others, who wait until it is there. Another program on its port
        may keep them for ever.

        Raises:
            OSError, RuntimeError: it cannot be made (the port is in use), or is not reached.
        """
        import torch.distributed as dist

        if not self.presides:
            _wait_until_listening(self.host, self.port, 2 * self.patience_s)
        limit = timedelta(seconds=CONNECT_S)
        with bounded(self.host, 2 * CONNECT_S):
            store = dist.TCPStore(self.host, self.port, None, self.presides, limit, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=2 * self.patience_s))
        return store


Tell = Callable[[Broken], None]
Bounded = Callable[[str, float], AbstractContextManager[None]]


class TooLate(Exception):
    """The others have begun without this node."""


def _wait_until_listening(host: str, port: int, patience_s: float) -> None:
    """Until somebody listens there. Being refused is to wait: no answer and no route will not mend themselves."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, port), CONNECT_S).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def check_links(
    meeting: Meeting, device: "torch.device", limit_s: float, tell: Tell, bounded: Bounded
) -> None:
    """Tell of each node that this one does not reach. All nodes of the job that are fit call it; the others call `stay_away`.

    Args:
        device: on which sums with neighbours are done.
        limit_s: for all of it, once the nodes have met.
        tell: is given each broken link as it is found.
        bounded: around what may hang, with the peer and the limit: ends this process, having told of the peer.

    Raises:
        OSError: this node has no address on the interface that is named for gloo.
        RuntimeError: the store cannot be made on this node, which is the first.
        TooLate: the others have begun without this node.
    """
    address = _address(meeting)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listen = ("" if is_loopback(address) else address, 0)
    with socket.create_server(listen, family=family, backlog=1024) as listener:
        place = Place(meeting.node, address, listener.getsockname()[1])
        try:
            store = meeting.open(bounded)
            roster = _meet(meeting, store, place)
        except (OSError, RuntimeError) as error:
            if meeting.presides:
                raise
            tell(Broken(meeting.host, f"the meeting at port {meeting.port} of it: {_short(error)}"))
            return
        place = next(entry for entry in roster if entry.node == meeting.node)
        try:
            unreached = asyncio.run(_ping_all(store, listener, place, roster, limit_s / 4))
            for broken in unreached:
                tell(broken)
            known = {broken.peer for broken in unreached}
            for broken in _sum_with_neighbours(store, place, roster, known, device, limit_s, bounded):
                tell(broken)
        finally:
            _leave(meeting, store, len(roster), limit_s)


def stay_away(meeting: Meeting, limit_s: float, bounded: Bounded) -> None:
    """What a node that is unfit owes the others: that they need not wait for it, and the store, if that is here."""
    with contextlib.suppress(OSError, RuntimeError):
        store = meeting.open(bounded)
        roster = _meet(meeting, store, None)
        if meeting.presides:
            _leave(meeting, store, len(roster) + 1, limit_s)


def _address(meeting: Meeting) -> str:
    """Of this node: on the interface that is named for gloo, else as another node of the job is reached."""
    name = os.environ.get(GLOO_INTERFACE, "").partition(",")[0]
    if not name:
        return own_address(meeting.host)
    found = psutil.net_if_addrs().get(name, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found:
            if entry.family == family:
                return entry.address
    raise OSError(f"{GLOO_INTERFACE}={name}: this node has no address there")


def _meet(meeting: Meeting, store: "torch.distributed.Store", place: Place | None) -> list[Place]:
    """Say that this node is here, at `place`, or (None) need not be waited for; who takes part, in the same order everywhere."""
    number = store.add(ARRIVED, 1)
    store.set(f"{CAME}/{number}", json.dumps(asdict(place) if place else None))
    if place is None and not meeting.presides:
        return []
    if meeting.presides:
        deadline = time.monotonic() + meeting.patience_s
        while store.add(ARRIVED, 0) < meeting.count and time.monotonic() < deadline:
            time.sleep(POLL_S)
        came = [json.loads(store.get(f"{CAME}/{n}")) for n in range(1, store.add(ARRIVED, 0) + 1)]
        places = sorted((Place(**entry) for entry in came if entry), key=lambda entry: entry.node)
        store.set(ROSTER, json.dumps([asdict(_as_seen(entry, places)) for entry in places]))
    roster = [Place(**entry) for entry in json.loads(store.get(ROSTER))]
    if place and place.node not in [entry.node for entry in roster]:
        raise TooLate(f"it came {meeting.patience_s:g} s after {meeting.host}, when the others had begun")
    return roster


def _as_seen(place: Place, places: Sequence[Place]) -> Place:
    """On many machines the own name, by which the first node knows itself, is a loopback address."""
    others = [other.host for other in places if not is_loopback(other.host)]
    return replace(place, host=own_address(others[0])) if others and is_loopback(place.host) else place


def _leave(meeting: Meeting, store: "torch.distributed.Store", count: int, limit_s: float) -> None:
    """Say that this node needs the store no more. The first node keeps it until `count` have said so, itself included."""
    with contextlib.suppress(RuntimeError):
        left = store.add(LEFT, 1)
        deadline = time.monotonic() + limit_s
        while meeting.presides and left < count and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = store.add(LEFT, 0)


async def _ping_all(
    store: "torch.distributed.Store",
    listener: socket.socket,
    own: Place,
    roster: Sequence[Place],
    limit_s: float,
) -> list[Broken]:
    """Send to all others and let it come back, and answer them until all are done."""
    server = await asyncio.start_server(_echo, sock=listener)
    gate = asyncio.Semaphore(AT_ONCE)
    here = roster.index(own)
    others = [*roster[here + 1 :], *roster[:here]]  # not all nodes ask the same one first
    deadline = time.monotonic() + limit_s
    found = await asyncio.gather(*(_ping(gate, own, other, limit_s) for other in others))
    done = await asyncio.to_thread(store.add, PINGED, 1)
    while done < len(roster) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        done = await asyncio.to_thread(store.add, PINGED, 0)
    server.close()
    return [broken for broken in found if broken]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        writer.write(await reader.readexactly(len(PAYLOAD)))
        await writer.drain()
    writer.close()


async def _ping(gate: asyncio.Semaphore, own: Place, other: Place, limit_s: float) -> Broken | None:
    async def there_and_back() -> bytes:
        reader, writer = await asyncio.open_connection(other.host, other.port, local_addr=(own.host, 0))
        try:
            writer.write(PAYLOAD)
            await writer.drain()
            return await reader.readexactly(len(PAYLOAD))
        finally:
            writer.close()

    where = f"{other.host} from {own.host}"
    async with gate:
        try:
            back = await asyncio.wait_for(there_and_back(), limit_s)
        except TimeoutError:
            return Broken(other.node, f"no answer of {where} in {limit_s:g} s")
        except (OSError, asyncio.IncompleteReadError) as error:
            return Broken(other.node, f"{where}: {_short(error)}")
    return None if back == PAYLOAD else Broken(other.node, f"{where}: what comes back differs")


def neighbours(index: int, count: int) -> list[int | None]:
    """With whom of a line of nodes one sums, first and second. Everyone has somebody."""
    first, second = (index ^ 1, index + 1 if index % 2 else index - 1)
    return [there if 0 <= there < count else None for there in (first, second)]


def _sum_with_neighbours(
    store: "torch.distributed.Store",
    own: Place,
    roster: Sequence[Place],
    unreached: Set[str],
    device: "torch.device",
    limit_s: float,
    bounded: Bounded,
) -> Iterator[Broken]:
    """All-reduces of two nodes. Who was in a pair that failed comes later to the next, which therefore waits for longer."""
    import torch.distributed as dist

    here = roster.index(own)
    for turn, there in enumerate(neighbours(here, len(roster))):
        if there is None or roster[there].node in unreached:
            continue
        peer, limit = roster[there], timedelta(seconds=limit_s / 4 * (turn + 1))
        pair = dist.PrefixStore(f"sum/{turn}/{min(here, there)}", store)
        try:
            with bounded(peer.node, limit_s), gloo_towards(peer.host):
                total = sum_of_two(pair, int(here > there), device, limit)
        except (OSError, RuntimeError) as error:
            yield Broken(peer.node, f"an all-reduce with it: {_short(error)}")
            continue
        if total != 3.0:
            yield Broken(peer.node, f"an all-reduce with it has a wrong sum: {total:g} for 3")


def sum_of_two(
    store: "torch.distributed.Store", rank: int, device: "torch.device", limit: timedelta
) -> float:
    """The mean of an all-reduce of ones and twos: 3, unless it went wrong. NCCL on a GPU, gloo on a CPU."""
    import torch
    import torch.distributed as dist

    store.set_timeout(limit)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group: dist.ProcessGroup = dist.ProcessGroupNCCL(store, rank, 2, options)
    else:
        group = dist.ProcessGroupGloo(store, rank, 2, limit)
    numbers = torch.full((1 << 18,), float(rank + 1), device=device)
    group.allreduce([numbers]).wait()
    return float(numbers.double().mean())


def _short(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:  # asyncio says "Connect call failed" of everything
        return os.strerror(error.errno)
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
