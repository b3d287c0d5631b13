"""Limits of servers, by a clock that jumps: of restarts, starts, waiting, and of requests on one."""

import asyncio
from typing import Any

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.servers.health import Health
from gtpo_megatron.rollout.sglang.servers.states import Worker
from tests.sglang.scenario import scenario
from tests.sglang.scripted import TIMING, Rehearsal, in_fake_time, rehearsal, request


def test_restarts_of_an_owned_server_back_off_and_stop_growing() -> None:
    async def play(running: Rehearsal) -> None:
        launch = running.launch
        launch.started.clear()
        launch.dying = 10
        launch.processes[0].end()
        await running.until(lambda: running.states == ["down"])
        await running.all_ready(limit_s=3600.0)
        times = [time for time, _ in launch.started]
        pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        assert len(times) == 11
        assert pauses == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[TIMING.backoff_max_s] * 4], abs=0.2)
        assert running.holds_current(running.server(0))

    scenario(play, count=1, owned=True)


def test_a_server_that_ends_twice_while_starting_ends_the_run() -> None:
    async def play() -> None:
        async with rehearsal(1, TIMING, owned=True, updated=False) as running:
            running.launch.dying = 9
            with pytest.raises(UserError, match=r"did not start(.|\n)*the end of its log"):
                await running.pool.wait_started()
            assert len(running.launch.started) == 2

    in_fake_time(play())


def test_a_given_server_that_never_answers_ends_the_run_at_its_limit() -> None:
    async def play() -> None:
        async with rehearsal(2, TIMING, updated=False, start_timeout_s=100.0) as running:
            running.servers["http://given:1"].health = "hung"
            with pytest.raises(UserError, match="http://given:1 did not start"):
                await running.pool.wait_started()
            assert 100.0 <= asyncio.get_running_loop().time() < 101.0

    in_fake_time(play())


def test_without_servers_requests_wait_so_long_and_no_longer() -> None:
    async def play(running: Rehearsal) -> None:
        for server in running.servers.values():
            server.health = "dead"
        await running.until(lambda: set(running.states) == {"down"})
        begun = asyncio.get_running_loop().time()
        with pytest.raises(UserError, match=r"usable for 50 s(.|\n)*given:0: down(.|\n)*given:1: down"):
            await request(running)
        assert 50.0 < asyncio.get_running_loop().time() - begun < 51.0
        for server in running.servers.values():
            server.restart()
        assert await request(running) == "run:1"

    scenario(play, no_server_timeout_s=50.0)


def test_places_go_to_the_least_loaded_and_in_order() -> None:
    async def play(running: Rehearsal) -> None:
        fleet = running.fleet
        first, second = fleet.workers
        held = [await fleet.acquire(None, first=False) for _ in range(4)]
        assert held.count(first) == held.count(second) == 2
        order: list[str] = []

        async def wait(name: str, at_once: bool) -> None:
            fleet.release(await fleet.acquire(None, at_once))
            order.append(name)

        waiting = [
            asyncio.create_task(wait(name, name == "first")) for name in ("a", "b", "first", "given up")
        ]
        await asyncio.sleep(0.1)
        assert order == []  # concurrency: 2 on each
        waiting.pop().cancel()
        for worker in held:
            fleet.release(worker)
        await asyncio.gather(*waiting)
        assert order == ["first", "a", "b"]
        assert (first.inflight, second.inflight) == (0, 0)

    scenario(play, concurrency=2)


def test_a_group_stays_on_its_server_up_to_an_imbalance() -> None:
    async def play(running: Rehearsal) -> None:
        fleet = running.fleet
        first, second = fleet.workers
        taken = [await fleet.acquire(first, first=False) for _ in range(12)]
        assert taken == [first] * 9 + [second] + [first] + [second]

    scenario(play)


def test_health_costs_no_more_calls_with_more_servers_and_leaves_those_alone_that_answer() -> None:
    async def play(running: Rehearsal) -> None:
        begun, minute = asyncio.get_running_loop().time(), 60.0
        busy = running.fleet.workers[0]
        while asyncio.get_running_loop().time() < begun + minute:
            await running.fleet.acquire(busy, first=False)
            await running.fleet.run(busy, lambda url: running.client.generate(url, 1.0))
        asked = [
            (index, path)
            for index in range(40)
            for time, path in running.server(index).asked
            if time >= begun and path in ("/health", "/model_info")
        ]
        assert minute / TIMING.health_pause_s * 1.9 < len(asked) <= minute / TIMING.health_pause_s * 2
        assert {index for index, _ in asked} == set(range(1, 40))  # all but the one that answers requests

    scenario(play, count=40)


def test_a_server_that_is_lost_before_its_check_begins_stays_lost() -> None:
    """The check is a task, which begins a moment after it was made."""

    async def play(running: Rehearsal) -> None:
        lost = running.fleet.workers[0]
        begin, checked = Health._check, []

        async def late(self: Health, worker: Worker, *state: Any) -> None:
            if worker is lost:
                checked.append(worker.state)
                running.server(0).health = "dead"
                running.fleet.lose(lost, "ended a moment ago")
            await begin(self, worker, *state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Health, "_check", late)
            await running.until(lambda: bool(checked))
            await asyncio.sleep(2 * TIMING.health_timeout_s)
        assert running.fleet.failure is None
        assert lost.state == "down"

    scenario(play)


def test_one_mistake_in_the_program_reaches_those_who_wait() -> None:
    async def play() -> None:
        running = Rehearsal(1, TIMING)
        await running.pool.start()
        await running.pool.wait_started()
        waiting = asyncio.create_task(request(running))
        await asyncio.sleep(0.1)
        running.server(0).ranks = None
        running.client.info = None  # a TypeError where it is called
        running.fleet.gate_open = True
        running.fleet.workers[0].move("suspect", "so that it is examined")
        with pytest.raises(TypeError):
            await waiting
        with pytest.raises(TypeError):
            await request(running)
        await running.pool.close()

    in_fake_time(play())
