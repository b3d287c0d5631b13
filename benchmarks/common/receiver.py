"""A plain receiver of weights: speaks SGLang's calls of an update, and keeps the tensors, without a model.

For tests and `benchmarks/weights.py`, which is about what the trainer does. By itself, `python -m benchmarks.common.receiver`,
it prints its URL; with `--die-at PATH:N` its process ends without a word when it is asked for PATH for the N-th time, in a
broadcast when the first bytes are due.
"""

import argparse
import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from aiohttp import web
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

BROADCAST = "/update_weights_from_distributed"


class Receiver:
    """The server, in a thread of its own. `dies` is called instead of an answer, where the count of a path says so."""

    def __init__(
        self, dies: Callable[[str, int], None] = lambda path, count: None, limit_s: float = 60.0
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: list[str] = []  # as they came, within the last update
        self.version = "default"
        self.asked: dict[str, int] = {}  # so often, by path
        self._dies = dies
        self._limit = timedelta(seconds=limit_s)  # of waiting for others
        self._groups: dict[str, ProcessGroupGloo] = {}
        self._memory: dict[tuple[str, ...], torch.Tensor] = {}  # used again for a bucket of the same names
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        self.asked[path] = self.asked.get(path, 0) + 1
        self._dies(path, self.asked[path])
        body = await request.json() if request.can_read_body else {}
        try:
            answer = await asyncio.to_thread(self._do, path, body)
        except RuntimeError as error:
            return web.Response(status=500, text=str(error))
        return web.json_response(answer)

    def _do(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/server_info":
            return {"tp_size": 1}
        if path == "/model_info":
            return {"weight_version": self.version}
        if path == "/begin_weight_update":
            self.names = []
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/init_weights_update_group":
            self._join(body)
        elif path == "/destroy_weights_update_group":
            self._groups.pop(body["group_name"], None)
        elif path == BROADCAST:
            self._receive(body)
        elif path == "/weights_checker":
            return {"ranks": [{"checksums": {name: _checksum(t) for name, t in self.tensors.items()}}]}
        return {"success": True}

    def _join(self, body: dict[str, Any]) -> None:
        size, name = body["world_size"], body["group_name"]
        store = TCPStore(
            body["master_address"], body["master_port"], size, is_master=False, timeout=self._limit
        )
        inner = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        self._groups[name] = ProcessGroupGloo(inner, body["rank_offset"], size, timeout=self._limit)

    def _receive(self, body: dict[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        shapes = [torch.Size(shape) for shape in body["shapes"]]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        key = tuple(body["names"])
        if key not in self._memory:
            self._memory[key] = torch.zeros(sum(sizes), dtype=torch.uint8)
        flat = self._memory[key]
        self._groups[body["group_name"]].broadcast(flat, 0).wait()
        parts = flat.split(sizes)
        for name, part, dtype, shape in zip(body["names"], parts, dtypes, shapes, strict=True):
            self.tensors[name] = part.view(dtype).view(shape)
            self.names.append(name)


def _checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def die_at(path: str, number: int) -> Callable[[str, int], None]:
    """For `Receiver`: this process ends there. In a broadcast that is a moment later, when the others have begun it."""

    def dies(asked: str, count: int) -> None:
        if (asked, count) == (path, number):
            if path != BROADCAST:
                os._exit(1)
            threading.Timer(0.3, lambda: os._exit(1)).start()
            threading.Event().wait()

    return dies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--die-at", default=":0")
    where, _, times = parser.parse_args().die_at.rpartition(":")
    receiver = Receiver(die_at(where, int(times)))
    print(receiver.url, flush=True)
    threading.Event().wait()
