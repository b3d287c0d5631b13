"""sglang-router: told which servers are ready, without a real one; and what the real one does with servers that are lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import SamplingParams
from gtpo_megatron.rollout.sglang.client import Client, NoServer, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.launch import make_launch
from gtpo_megatron.rollout.sglang.servers.router import Router
from gtpo_megatron.rollout.sglang.servers.states import Worker
from tests.sglang.scripted import in_fake_time

A, B, C = "http://a:1", "http://b:1", "http://c:1"


class ScriptedRouter:
    """Shows workers some seconds after it was told of them; client and launch in one."""

    def __init__(self) -> None:
        self.starts = 0
        self.process = SimpleNamespace(alive=True, end=lambda: None)
        self.shown: dict[str, str] = {}
        self.calls: list[str] = []
        self.silent = False
        self.deaf = False  # takes what it is told, and does nothing

    def router(self) -> tuple[Any, str]:
        self.starts += 1
        self.shown.clear()
        self.process = SimpleNamespace(alive=True, end=lambda: None)
        return self.process, f"http://router:{self.starts}"

    async def router_workers(self, url: str) -> dict[str, str]:
        if self.silent:
            raise ServerFault("no answer")
        return dict(self.shown)

    async def add_worker(self, url: str, worker: str) -> None:
        self.calls.append(f"add {worker}")
        if not self.deaf:
            asyncio.get_running_loop().call_later(1.0, lambda: self.shown.update({worker: f"id of {worker}"}))

    async def remove_worker(self, url: str, identity: str) -> None:
        self.calls.append(f"remove {identity}")
        self.shown.pop(identity.removeprefix("id of "), None)


def kept(play: Callable[[Router, ScriptedRouter, set[str]], Awaitable[None]]) -> None:
    """Play with a router that is kept before a set of ready workers."""

    async def run() -> None:
        script, ready = ScriptedRouter(), {A, B}
        router = Router(script, script)
        keeper = asyncio.create_task(router.keep(lambda: frozenset(ready)))
        await play(router, script, ready)
        keeper.cancel()

    in_fake_time(run())


def test_it_is_told_of_workers_that_come_and_go_and_stays_up() -> None:
    async def play(router: Router, script: ScriptedRouter, ready: set[str]) -> None:
        assert router.url is None
        await asyncio.sleep(3.0)
        assert router.url == "http://router:1" and set(script.shown) == {A, B}
        script.calls.clear()
        ready ^= {B, C}
        await asyncio.sleep(3.0)
        assert router.url == "http://router:1"
        assert script.calls == [f"remove id of {B}", f"add {C}"] and set(script.shown) == {A, C}
        assert script.starts == 1
        ready.clear()
        await asyncio.sleep(1.0)
        assert router.url is None and script.starts == 1

    kept(play)


def test_it_is_told_again_after_a_while() -> None:
    async def play(router: Router, script: ScriptedRouter, ready: set[str]) -> None:
        script.deaf = True
        await asyncio.sleep(9.0)
        assert sorted(script.calls) == [f"add {A}", f"add {B}"] and router.url is None
        script.deaf = False
        await asyncio.sleep(5.0)
        assert sorted(script.calls) == sorted([f"add {A}", f"add {B}"] * 2)
        assert router.url is not None

    kept(play)


def test_without_it_requests_go_straight_to_the_workers_until_it_is_back() -> None:
    async def play(router: Router, script: ScriptedRouter, ready: set[str]) -> None:
        await asyncio.sleep(3.0)
        script.silent = True
        await asyncio.sleep(0.5)
        assert router.url is None
        script.silent = False
        await asyncio.sleep(0.5)
        assert router.url == "http://router:1"
        router.doubt()
        assert router.url is None
        script.process.alive = False
        await asyncio.sleep(3.0)
        assert router.url == "http://router:2" and set(script.shown) == {A, B}

    kept(play)


def test_a_worker_that_is_lost_while_it_is_told_of_others_is_not_sent_to() -> None:
    async def play(router: Router, script: ScriptedRouter, ready: set[str]) -> None:
        await asyncio.sleep(3.0)
        ready.add(C)
        told = asyncio.Event()

        async def add_worker(url: str, worker: str) -> None:
            told.set()
            await asyncio.sleep(1.0)

        script.add_worker = add_worker
        await told.wait()
        ready.remove(A)
        router.doubt()
        await asyncio.sleep(1.05)
        assert router.url is None
        await asyncio.sleep(1.0)
        assert router.url is not None and set(script.shown) == {B}

    kept(play)


def fleet_of(*workers: Worker) -> Fleet:
    router = SimpleNamespace(url="http://router:1", doubts=[])
    router.doubt = lambda: router.doubts.append(True)
    fleet = Fleet(SGLangConfig(router=True), router, 100)
    fleet.workers += workers
    fleet.gate_open = True
    for worker in workers:
        fleet.move(worker, "stale", "")
        fleet.move(worker, "ready", "")
    return fleet


def test_the_server_that_a_router_could_not_reach_is_the_suspect() -> None:
    async def play() -> None:
        asked, other = Worker(0, A, owned=False), Worker(1, "http://a:12", owned=False)
        fleet = fleet_of(asked, other)

        async def fail(text: str) -> None:
            raise ServerFault(f"http://router:1/generate answered 500: {text}")

        for text, suspects, doubts in (
            ('{"message": "error sending request for url (http://a:12/generate)"}', [other], [True]),
            ("out of memory", [], [True]),
        ):
            with pytest.raises(ServerFault):
                await fleet.run(await fleet.acquire(asked, first=False), lambda _, text=text: fail(text))
            assert [w for w in fleet.workers if w.state == "suspect"] == suspects
            assert fleet.router.doubts == doubts
            fleet.router.doubts.clear()
            for worker in suspects:
                fleet.move(worker, "ready", "")

    in_fake_time(play())


@pytest.mark.parametrize(
    ("owned", "listens", "others_go_on"),
    [(True, True, True), (False, False, True), (False, True, False)],
    ids=["killed by us", "refuses connections", "does not answer"],
)
def test_only_a_server_that_may_still_hold_requests_costs_all_of_them(
    owned: bool, listens: bool, others_go_on: bool
) -> None:
    async def play() -> None:
        lost, other = Worker(0, A, owned=owned), Worker(1, B, owned=False)
        fleet = fleet_of(lost, other)

        async def send(_: str) -> str:
            await asyncio.sleep(10.0)
            return "done"

        tasks = [
            asyncio.create_task(fleet.run(await fleet.acquire(w, first=False), send)) for w in (lost, other)
        ]
        await asyncio.sleep(1.0)
        lost.listens = listens
        fleet.lose(lost, "lost")
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer == "done" for answer in answers] == [others_go_on] * 2

    in_fake_time(play())


async def upstream(name: str, arrived: dict[str, str]) -> tuple[web.AppRunner, str]:
    """A server whose completions take a while, those of `quick` none."""

    async def generate(request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        arrived[rid] = name
        await asyncio.sleep(0 if rid == "quick" else 6.0)
        meta = {
            "output_token_logprobs": [[-1.0, 5, None]],
            "weight_version": name,
            "finish_reason": {"type": "stop"},
        }
        return web.json_response({"output_ids": [5], "meta_info": meta})

    async def other(_: web.Request) -> web.Response:
        return web.json_response({"model_path": "m", "served_model_name": "m", "tp_size": 1})

    application = web.Application()
    application.router.add_post("/generate", generate)
    application.router.add_get("/{path:.*}", other)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.mark.sglang
def test_a_real_router_fails_the_requests_of_a_server_that_dies_and_no_others(
    sglang_python: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # the router tries HTTP/2 first
    config = SGLangConfig(python=sglang_python, router=True)
    launch = make_launch(config, str(tiny_checkpoint("llama")), "fp32", "cpu", tmp_path)

    async def play() -> None:
        arrived: dict[str, str] = {}
        (first, a), (second, b) = [await upstream(name, arrived) for name in "ab"]
        client, ready = Client(None, 60.0), {a, b}
        router = Router(launch, client)
        keeper = asyncio.create_task(router.keep(lambda: frozenset(ready)))
        try:
            while (at := router.url) is None or len(await client.router_workers(at)) < 2:
                await asyncio.sleep(0.2)
            params = SamplingParams(1, 8)
            rids = [f"{n}" for n in range(8)]
            asked = [
                asyncio.create_task(client.generate(at, [7 * n, n, 3], params, 8, rid))
                for n, rid in enumerate(rids)
            ]
            while len(arrived) < len(rids):
                await asyncio.sleep(0.1)
            assert set(arrived.values()) == {"a", "b"}
            ready.remove(b)
            while b in await client.router_workers(at):
                await asyncio.sleep(0.1)
            assert (await client.generate(at, [1, 2], params, 8, "quick")).weight_version == "a"
            assert not any(task.done() for task in asked)  # what was taken from the router goes on
            await second.cleanup()  # and dies
            for rid, answer in zip(rids, await asyncio.gather(*asked, return_exceptions=True), strict=True):
                if arrived[rid] == "a":
                    assert answer.weight_version == "a"
                else:
                    assert (
                        isinstance(answer, ServerFault) and f"{b}/" in str(answer).partition(" answered ")[2]
                    )
            with pytest.raises(NoServer):
                await client.info(b)
        finally:
            keeper.cancel()
            router.process.end()
            await client.close()
            await first.cleanup()

    asyncio.run(asyncio.wait_for(play(), 240))
