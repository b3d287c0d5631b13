"""Pipeline stages whose weights leave the trainer from another rank than rank 0, which alone talks to the servers.

A `StageSender` lives on the sender of each such stage. It takes the buckets of its stage as they are exported, keeps a copy
for servers that come late, and does what rank 0 asks for by its `RemoteStage`: makes a process group with servers, and
broadcasts a bucket. They talk in lines of JSON, a connection for each call, with a token that only this run knows.
"""

import asyncio
import json
import secrets
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from gtpo_megatron.rollout.protocol import NamedTensor
from gtpo_megatron.rollout.sglang.weights.broadcast import Target
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, Layout, Snapshot, fill
from gtpo_megatron.rollout.sglang.weights.outlets import LocalOutlet, Opening

T = TypeVar("T")
HOST = "cpu"  # device of the kept copies


@dataclass(frozen=True)
class Address:
    """Where a sender is asked, by whom."""

    rank: int  # of the trainer
    host: str
    port: int
    token: str


@dataclass(frozen=True, eq=False)
class RemoteBucket(Layout):
    """A bucket that another rank holds."""

    outlet: "RemoteStage"
    update: int
    number: int
    device: str  # HOST: the kept copy


class RemoteStage:
    """Rank 0's side: the sender of a stage, as an outlet. In one event loop; what fails is a RuntimeError that names the rank."""

    def __init__(
        self, address: Address, layouts: Sequence[Layout], collective_s: float, wait_s: float
    ) -> None:
        self.layouts = tuple(layouts)
        self._address = address
        self._collective_s, self._wait_s = collective_s, wait_s

    async def filled(self, update: int, number: int) -> RemoteBucket:
        """A bucket of an update (they are counted from 1), when it has been exported."""
        device = await self._call("filled", self._wait_s, update=update, number=number)
        return self._bucket(update, number, device)

    async def release(self, number: int) -> None:
        """The bucket is no longer needed where it was exported to."""
        await self._call("release", self._collective_s, number=number)

    async def abandon(self, update: int) -> None:
        """The update is given up: the sender is not to wait for its buckets to be taken."""
        await self._call("abandon", self._collective_s, update=update)

    def kept(self, update: int) -> list[RemoteBucket]:
        """The copies that the sender keeps of an update, until the next one."""
        return [self._bucket(update, number, HOST) for number in range(len(self.layouts))]

    async def open(self, targets: Sequence[Target], device: str) -> Opening:
        named = [asdict(target) for target in targets]
        return Opening(**await self._call("open", self._collective_s, targets=named, device=device))

    async def join(self) -> None:
        await self._call("join", 2 * self._collective_s)

    async def send(self, bucket: RemoteBucket) -> None:
        fields = {"update": bucket.update, "number": bucket.number, "device": bucket.device}
        await self._call("send", 2 * self._collective_s, **fields)

    async def leave(self) -> None:
        await self._call("leave", self._collective_s)

    def _bucket(self, update: int, number: int, device: str) -> RemoteBucket:
        layout = self.layouts[number]
        return RemoteBucket(layout.names, layout.dtypes, layout.shapes, self, update, number, device)

    async def _call(self, verb: str, limit_s: float, **fields: Any) -> Any:
        where = self._address
        request = {"token": where.token, "verb": verb, "fields": fields}
        try:
            async with asyncio.timeout(limit_s):
                reader, writer = await asyncio.open_connection(where.host, where.port)
                try:
                    writer.write(json.dumps(request).encode() + b"\n")
                    answer = json.loads(await reader.readline())
                finally:
                    writer.close()
        except TimeoutError as error:
            raise RuntimeError(f"rank {where.rank}, {verb} of weights: no answer in {limit_s:g} s") from error
        except (OSError, ValueError) as error:
            raise RuntimeError(f"rank {where.rank}, {verb} of weights: {error}") from error
        if "error" in answer:
            raise RuntimeError(f"rank {where.rank}, {verb} of weights: {answer['error']}")
        return answer["result"]


async def relay(stage: RemoteStage, send: Callable[[RemoteBucket], Awaitable[None]], update: int) -> None:
    """Send a stage's buckets of an update as they are exported."""
    for number in range(len(stage.layouts)):
        await send(await stage.filled(update, number))
        await stage.release(number)


async def give_up(stages: Sequence[RemoteStage], update: int, relays: Sequence[Future[None]]) -> None:
    """Let the senders of an update that failed go on; one that does not answer is passed over."""
    for future in relays:
        future.cancel()
    await asyncio.gather(*(stage.abandon(update) for stage in stages), return_exceptions=True)


class StageSender:
    """The sender's side. Made, fed (`update`) and closed by the rank's main thread; answers in a thread of its own.

    Args:
        rank: of this process.
        host: this machine's address, by which rank 0 reaches it.
        layouts: of the stage's buckets.
        collective_s: time limit of one broadcast, and of joining a group.
        wait_s: time limit of waiting until rank 0 has taken a bucket.
    """

    def __init__(
        self, rank: int, host: str, layouts: Sequence[Layout], collective_s: float, wait_s: float
    ) -> None:
        self.layouts = tuple(layouts)
        self._wait_s = wait_s
        self._outlet = LocalOutlet(collective_s)
        self._snapshot = Snapshot(0)
        self._update = 0
        self._live: Bucket | None = None  # the newest, until it is released
        self._offered = self._released = 0  # buckets of the update
        self._abandoned = 0  # the newest update that rank 0 has given up
        self._failure = ""
        self._verbs: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "filled": self._filled,
            "release": self._release,
            "abandon": self._abandon,
            "open": self._open,
            "join": self._outlet.join,
            "send": self._send,
            "leave": self._outlet.leave,
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage-sender", daemon=True)
        self._thread.start()
        self._changed, self._sending, self._server = self._run(self._start(host))
        self.address = Address(rank, host, self._server.sockets[0].getsockname()[1], secrets.token_hex(16))

    def update(self, weights: Iterable[NamedTensor]) -> None:
        """Export the stage once: its buckets are filled one ahead of the one that is being sent.

        Returns when the last bucket is filled. Raises RuntimeError where the export is not as it was laid out, or rank 0 does
        not take a bucket in time.
        """
        self._run(self._begin())  # from here on nothing is sent of the copies, whose memory is used again
        memory = [bucket.flat for bucket in self._snapshot.buckets]
        self._snapshot = Snapshot(self._update, memory=memory)
        try:
            for bucket in fill(self.layouts, weights, memory):
                self._snapshot.add(bucket)
                self._run(self._offer(bucket))
        except BaseException as error:
            self._run(self._fail(f"{type(error).__name__}: {error}"))
            raise

    def close(self) -> None:
        """Answer no more."""

        async def stop() -> None:
            self._server.close()
            self._outlet.close()

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._snapshot.delete()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self, host: str) -> tuple[asyncio.Condition, asyncio.Lock, asyncio.Server]:
        return asyncio.Condition(), asyncio.Lock(), await asyncio.start_server(self._answer, host, 0)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await reader.readline())
            if not secrets.compare_digest(str(request["token"]), self.address.token):
                return
            answer = {"result": await self._verbs[request["verb"]](**request["fields"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except OSError:
            pass  # whoever asked does not wait any more
        finally:
            writer.close()

    # ------------------------------------------------------------------ what the main thread tells

    async def _begin(self) -> None:
        async with self._sending, self._changed:
            self._update += 1
            self._offered = self._released = 0
            self._failure = ""

    async def _offer(self, bucket: Bucket) -> None:
        async with self._changed:
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._changed.wait_for(
                        lambda: self._released == self._offered or self._abandoned >= self._update
                    )
            except TimeoutError as error:
                raise RuntimeError(f"rank 0 took no bucket of weights for {self._wait_s:g} s") from error
            self._live = bucket
            self._offered += 1
            self._changed.notify_all()

    async def _fail(self, text: str) -> None:
        async with self._changed:
            self._failure = text
            self._changed.notify_all()

    # ------------------------------------------------------------------ what rank 0 asks

    async def _filled(self, update: int, number: int) -> str:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._update >= update and (self._failure or self._offered > number)
            )
            if self._failure:
                raise RuntimeError(self._failure)
            return str(self._held(update, number).flat.device)

    async def _release(self, number: int) -> None:
        async with self._changed:
            self._live, self._released = None, number + 1
            self._changed.notify_all()

    async def _abandon(self, update: int) -> None:
        async with self._changed:
            self._abandoned = update
            self._live = None
            self._changed.notify_all()

    async def _open(self, targets: list[dict[str, Any]], device: str) -> dict[str, Any]:
        return asdict(await self._outlet.open([Target(**target) for target in targets], device))

    async def _send(self, update: int, number: int, device: str) -> None:
        async with self._sending:
            # On a CPU the live bucket is the copy; of an update that is over, there are copies alone.
            if device == HOST and update == self._update and number < self._offered:
                await self._outlet.send(self._snapshot.buckets[number])
            else:
                await self._outlet.send(self._held(update, number))

    def _held(self, update: int, number: int) -> Bucket:
        if self._live is None or (update, number) != (self._update, self._offered - 1):
            raise RuntimeError(f"bucket {number} of update {update} is not held any more")
        return self._live
