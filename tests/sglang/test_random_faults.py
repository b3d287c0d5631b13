"""Random faults upon servers without servers: what the files test_states play one by one, in thousands of orders."""

import asyncio
import logging
import random

import pytest

from gtpo_megatron.rollout.sglang.servers.states import MOVES
from tests.sglang.scripted import (
    TIMING,
    FakeServer,
    Rehearsal,
    check_sound,
    in_fake_time,
    keep_checking,
    rehearsal,
    request,
)

SOME, MANY, FAULTS = 500, 5_000, 12  # random sequences, of so many faults each


@pytest.mark.parametrize(
    "seeds",
    [range(SOME), pytest.param(range(SOME, MANY), marks=pytest.mark.soak)],
    ids=["some", "many"],
)
def test_random_faults_are_survived(
    seeds: range, moves: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happens: no wrong sample, no lost request, no forbidden move; and once it ends, all are ready again."""
    caplog.set_level(logging.CRITICAL, "gtpo_megatron")  # a warning for each fault
    for seed in seeds:
        in_fake_time(_random_run(random.Random(seed)))
    assert set(moves) == {(before, after) for before, followers in MOVES.items() for after in followers}


async def _random_run(chance: random.Random) -> None:
    owned = chance.random() < 0.5
    async with rehearsal(3, TIMING, owned, concurrency=4) as running:
        workers = running.fleet.workers
        answered: list[str] = []

        async def sample() -> None:
            answered.append(await request(running, chance.choice(workers), chance.uniform(0.0, 2.0)))

        checking = asyncio.create_task(keep_checking(running))
        requests = []
        updating: asyncio.Task[None] | None = None
        for _ in range(FAULTS):
            requests += [asyncio.create_task(sample()) for _ in range(chance.randrange(3))]
            if chance.random() < 0.3 and (updating is None or updating.done()):
                updating = asyncio.create_task(running.update())  # so that the next ones fall into it
            else:
                _misfortune(running, chance)
            await asyncio.sleep(chance.choice((0.0, 0.005, 0.03, 0.1, 1.0, 4.0)))
        for server in running.servers.values():
            server.broken.clear()
            if server.health in ("erring", "hung"):
                server.health = "well"
            elif server.health == "dead" and not owned:
                server.restart()
        if updating is not None:
            await updating
        await running.all_ready()
        await asyncio.gather(*requests)
        assert not checking.done(), checking.exception()
        checking.cancel()
        check_sound(running)
        assert len(answered) == len(requests)
        assert [worker.inflight for worker in workers] == [0, 0, 0]


def _misfortune(running: Rehearsal, chance: random.Random) -> None:
    """One thing that goes wrong, or right again."""
    server: FakeServer = running.server(chance.randrange(3))
    kind = chance.randrange(6)
    if kind == 0:
        server.health = "dead"
        for process in running.launch.processes if running.launch else ():
            if process.server is server:
                process.end()
    elif kind == 1:
        server.health = chance.choice(("erring", "hung"))
    elif kind == 2:
        path = chance.choice(("/generate", "/health", "/begin_weight_update", "/update_weights_from_tensor"))
        server.broken[path] = chance.choice(("erring", "hung"))
    elif kind == 3 and server.health == "well":
        server.restart()  # behind our back
    elif kind == 4 and running.launch is None:
        server.restart()
    else:
        server.broken.clear()
        if server.health in ("erring", "hung"):
            server.health = "well"
