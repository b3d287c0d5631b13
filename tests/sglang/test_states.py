"""The state machine of servers, without servers: every move, what leads to it, and patience by a clock that jumps."""

import asyncio
from itertools import product

import pytest

from gtpo_megatron.rollout.sglang.servers.states import MOVES, Worker
from tests.sglang.scenario import scenario
from tests.sglang.scripted import TIMING, Rehearsal, in_fake_time, rehearsal, request


@pytest.mark.parametrize(("before", "after"), product(MOVES, MOVES))
def test_only_the_moves_of_the_table_can_be_made(before: str, after: str) -> None:
    worker = Worker(0, "http://a:1", owned=False, state=before)
    worker.wake.clear()
    if before == after or after in MOVES[before]:
        worker.move(after, "because")
        assert (worker.state, worker.reason) == (after, "because")
        assert worker.wake.is_set()
    else:
        with pytest.raises(RuntimeError, match=f"{before} -> {after} .* is no move"):
            worker.move(after, "because")
        assert worker.state == before


def test_a_server_is_sampled_from_once_it_holds_the_weights(moves: list[tuple[str, str]]) -> None:
    async def play() -> None:
        async with rehearsal(2, TIMING, updated=False) as running:
            await running.pool.wait_started()
            assert running.states == ["stale", "stale"]
            early = asyncio.create_task(request(running))
            await asyncio.sleep(5.0)
            assert not early.done()  # the gate is closed before the first update
            await running.update()
            assert running.states == ["ready", "ready"]
            assert await early == "run:1"
            assert all(running.holds_current(server) for server in running.servers.values())

    in_fake_time(play())
    assert moves == [("down", "stale")] * 2 + [("stale", "ready")] * 2


def test_a_failed_request_is_examined_and_answered_by_another(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        first = running.fleet.workers[0]
        running.server(0).broken["/generate"] = "erring"
        moves.clear()
        assert await request(running, first) == "run:1"
        running.server(0).broken.clear()
        await running.all_ready()
        assert moves == [("ready", "suspect"), ("suspect", "ready")]

    scenario(play)


def test_a_server_that_says_it_is_well_and_always_fails_is_given_up(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).broken["/generate"] = "erring"
        first = running.fleet.workers[0]
        for _ in range(TIMING.health_failures):
            await running.all_ready()
            await request(running, first)
        await running.until(lambda: running.states[0] == "down")
        assert "failed 3 times in a row, at last: http://given:0/generate answered 500" in first.reason
        assert moves.count(("ready", "suspect")) == TIMING.health_failures

    scenario(play)


def test_a_server_that_dies_is_found_and_comes_back_with_the_weights(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        lost = running.server(0)
        lost.health = "dead"
        moves.clear()
        seconds = await running.until(lambda: running.states[0] == "down")
        assert seconds < 2 * TIMING.health_interval_s + TIMING.health_failures
        await request(running)
        lost.restart()
        await running.all_ready()
        assert running.holds_current(lost)
        assert moves == [("ready", "suspect"), ("suspect", "down"), ("down", "stale"), ("stale", "ready")]

    scenario(play)


def test_a_hung_server_is_found_in_the_time_that_the_settings_say(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).health = "hung"
        moves.clear()
        seconds = await running.until(lambda: running.states[0] == "down")
        limit = TIMING.health_interval_s + TIMING.health_timeout_s * (1 + TIMING.health_failures)
        assert seconds < limit + 2.0
        running.server(0).health = "well"  # it held its weights all the while
        await running.all_ready()
        assert moves == [("ready", "suspect"), ("suspect", "down"), ("down", "ready")]

    scenario(play)


def test_a_server_restarted_behind_our_back_gets_the_weights_again(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).restart()
        moves.clear()
        await running.until(lambda: running.states[0] == "stale")
        await running.all_ready()
        assert running.holds_current(running.server(0))
        assert moves == [("ready", "stale"), ("stale", "ready")]

    scenario(play)


def test_under_examination_and_restarted_meanwhile(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).health = "erring"
        await running.until(lambda: running.states[0] == "suspect")
        moves.clear()
        running.server(0).restart()
        await running.all_ready()
        assert running.holds_current(running.server(0))
        assert moves == [("suspect", "stale"), ("stale", "ready")]

    scenario(play)
