"""Servers that share their GPUs with the trainer, without servers: who holds memory when, whatever fails meanwhile."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import pytest

from tests.sglang.scripted import (
    LATENCY_S,
    TIMING,
    FakeServer,
    Rehearsal,
    in_fake_time,
    keep_checking,
    rehearsal,
    request,
)

WHOLE = {"weights", "kv_cache"}
MEMORY_CALLS = ("/release_memory_occupation", "/resume_memory_occupation")
SEQUENCES, STEPS = 200, 5


def scenario(test: Callable[[Rehearsal], Awaitable[None]], count: int = 2) -> None:
    """Play a scenario on servers started here that are ready with the first update's weights."""

    async def play() -> None:
        async with rehearsal(count, TIMING, owned=True, concurrency=4) as running:
            await test(running)

    in_fake_time(play())


def living(running: Rehearsal) -> list[FakeServer]:
    """The servers whose processes run, those that a restart has replaced included."""
    return [process.server for process in running.launch.processes if process.alive]


async def training_turn(running: Rehearsal) -> None:
    """Servers give up their memory; nobody has any until the turn ends."""
    await running.pool.occupation.release_memory()
    assert all(not server.memory for server in living(running))


async def update_turn(running: Rehearsal) -> None:
    """Room for weights, the weights, and the rest."""
    await running.pool.occupation.resume_weights()
    assert all(server.memory in ({"weights"}, WHOLE) for server in living(running))
    await running.update()
    await running.updates.wait_settled()
    await running.pool.occupation.resume_cache()


def test_servers_give_up_their_memory_and_take_it_in_two_parts() -> None:
    async def play(running: Rehearsal) -> None:
        assert await request(running) == "run:1"
        await training_turn(running)
        assert running.states == ["stale", "stale"]
        waiting = asyncio.create_task(request(running))
        await asyncio.sleep(100.0)  # as long as training takes
        assert not waiting.done()
        assert all(not server.memory for server in living(running))

        await running.pool.occupation.resume_weights()
        assert [server.memory for server in living(running)] == [{"weights"}] * 2
        await running.update()
        assert running.states == ["ready", "ready"]
        await asyncio.sleep(100.0)
        assert not waiting.done()  # without a cache none is sampled from, nor asked for its health

        await running.pool.occupation.resume_cache()
        assert await waiting == "run:2"
        assert all(running.holds_current(server) and server.memory == WHOLE for server in living(running))
        await asyncio.sleep(100.0)
        assert [server.misused for server in living(running)] == [[], []]

    scenario(play)


def test_a_release_stops_sampling_and_empties_the_queues_first() -> None:
    async def play(running: Rehearsal) -> None:
        begun = len(running.server(0).asked)
        await training_turn(running)
        paths = [path for _, path in running.server(0).asked[begun:]]
        assert paths == ["/pause_generation", "/abort_request", "/release_memory_occupation"]

    scenario(play)


def test_health_that_is_being_asked_for_is_waited_for() -> None:
    """SGLang samples a token to answer; left in its queue it would be sampled without a cache."""

    async def play(running: Rehearsal) -> None:
        worker, server = running.fleet.workers[0], running.server(0)
        await running.until(lambda: worker.checking, step_s=LATENCY_S / 4)
        await training_turn(running)
        assert not worker.checking
        asked = [path for _, path in server.asked]
        assert asked.index("/pause_generation", asked.index("/health")) > asked.index("/health")
        await update_turn(running)
        assert await request(running, worker) == "run:2"
        assert server.misused == []

    scenario(play)


def test_a_server_that_dies_asleep_is_started_when_the_memory_is_the_servers() -> None:
    async def play(running: Rehearsal) -> None:
        await training_turn(running)
        running.launch.processes[0].end()
        await running.until(lambda: running.states == ["down", "stale"])
        await asyncio.sleep(100.0)
        assert len(running.launch.started) == 2
        await update_turn(running)
        await running.all_ready()
        assert len(running.launch.started) == 3
        assert all(running.holds_current(server) and server.memory == WHOLE for server in living(running))

    scenario(play)


def test_an_update_waits_for_servers_that_have_all_died_asleep() -> None:
    async def play(running: Rehearsal) -> None:
        await training_turn(running)
        for process in running.launch.processes:
            process.end()
        await running.until(lambda: running.states == ["down", "down"])
        await update_turn(running)
        assert await request(running) == "run:2"

    scenario(play)


@pytest.mark.parametrize("ailment", ["erring", "hung"])
def test_a_server_that_does_not_give_up_its_memory_is_ended(ailment: str) -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).broken["/release_memory_occupation"] = ailment
        await training_turn(running)  # looks at all that live
        assert [process.alive for process in running.launch.processes] == [False, True]
        await update_turn(running)
        assert await request(running) == "run:2"
        await running.all_ready()

    scenario(play)


@pytest.mark.parametrize("turn", ["weights", "kv_cache"])
@pytest.mark.parametrize("ailment", ["erring", "hung"])
def test_a_server_that_does_not_take_its_memory_is_started_anew(turn: str, ailment: str) -> None:
    async def play(running: Rehearsal) -> None:
        server = running.server(0)
        await training_turn(running)
        if turn == "weights":
            server.broken["/resume_memory_occupation"] = ailment
            await update_turn(running)
        else:
            await running.pool.occupation.resume_weights()
            await running.update()
            server.broken["/resume_memory_occupation"] = ailment
            await running.pool.occupation.resume_cache()
        assert server not in living(running)
        assert await request(running) == "run:2"
        await running.all_ready()
        assert all(running.holds_current(server) for server in living(running))

    scenario(play)


def test_a_server_that_fails_an_update_is_started_anew_for_it_cannot_be_examined() -> None:
    async def play(running: Rehearsal) -> None:
        server = running.server(0)
        server.broken["/update_weights_from_tensor"] = "erring"
        await training_turn(running)
        await update_turn(running)
        assert await request(running) == "run:2"
        await running.all_ready()
        assert server not in living(running) and server.misused == []

    scenario(play)


def test_a_server_that_is_being_started_is_waited_for_before_it_is_put_to_sleep() -> None:
    async def play(running: Rehearsal) -> None:
        running.launch.processes[0].end()
        await running.until(lambda: len(running.launch.started) == 3)
        starting = running.server(0)
        starting.broken["/health"] = "erring"  # not ready yet
        await running.until(lambda: "/health" in [path for _, path in starting.asked])
        releasing = asyncio.create_task(training_turn(running))
        await asyncio.sleep(50.0)
        assert not releasing.done() and starting.memory == WHOLE
        starting.broken.clear()
        await releasing
        await update_turn(running)
        await running.all_ready()
        assert [server.misused for server in living(running)] == [[], []]

    scenario(play)


def test_old_weights_are_brought_to_nobody_before_the_update() -> None:
    async def play(running: Rehearsal) -> None:
        await training_turn(running)
        begun = [len(server.asked) for server in living(running)]
        await running.pool.occupation.resume_weights()
        await asyncio.sleep(100.0)
        for server, before in zip(living(running), begun, strict=True):
            assert [path for _, path in server.asked[before:]] == ["/resume_memory_occupation"]

    scenario(play)


def test_whatever_fails_no_server_holds_memory_in_the_trainers_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Random faults at random moments: every step ends, none is asked for memory that it has not, all are well again."""
    caplog.set_level(logging.CRITICAL, "gtpo_megatron")
    restarts = 0
    for seed in range(SEQUENCES):
        restarts += in_fake_time(_random_steps(random.Random(seed)))
    assert restarts > SEQUENCES


async def _random_steps(chance: random.Random) -> int:
    async with rehearsal(3, TIMING, owned=True, concurrency=4) as running:
        checking = asyncio.create_task(keep_checking(running))
        trouble = asyncio.create_task(_keep_troubling(running, chance))
        for step in range(STEPS):
            await asyncio.gather(*(request(running, None, chance.uniform(0.0, 2.0)) for _ in range(3)))
            await training_turn(running)
            for _ in range(10):
                await asyncio.sleep(chance.choice((0.0, 0.1, 1.0)))
                assert all(not server.memory for server in living(running))
            await update_turn(running)
            assert running.fleet.tag == f"run:{step + 2}"
        assert not trouble.done(), trouble.exception()
        trouble.cancel()
        for server in living(running):
            server.broken.clear()
            server.health = "well"
        await running.all_ready()
        assert not checking.done(), checking.exception()
        checking.cancel()
        assert all(not server.misused for server in running.servers.values())
        return len(running.launch.started) - 3


async def _keep_troubling(running: Rehearsal, chance: random.Random) -> None:
    """A fault every now and then, of one server at a time; the others get well."""
    while True:
        await asyncio.sleep(chance.choice((0.01, 0.1, 2.0, 5.0)))
        for server in living(running):
            server.broken.clear()
            server.health = "well"
        alive = [process for process in running.launch.processes if process.alive]
        kind = chance.randrange(3) if alive else 3
        process = chance.choice(alive or [None])
        if kind == 0:
            process.end()
        elif kind == 1:
            process.server.health = chance.choice(("erring", "hung"))
        elif kind == 2:
            path = chance.choice((*MEMORY_CALLS, "/health", "/generate", "/update_weights_from_tensor"))
            process.server.broken[path] = chance.choice(("erring", "hung"))
