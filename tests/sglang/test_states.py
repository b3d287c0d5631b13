"""The state machine of servers, without servers: every move, what leads to it, and patience by a clock that jumps."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import product

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.servers.states import MOVES, Worker
from tests.sglang.scripted import (
    ON_DISK,
    TIMING,
    Rehearsal,
    check_sound,
    in_fake_time,
    keep_checking,
    rehearsal,
    request,
)


def scenario(
    test: Callable[[Rehearsal], Awaitable[None]], count: int = 2, owned: bool = False, **config: object
) -> None:
    """Play a scenario on servers that are ready with the first update's weights."""

    async def play() -> None:
        async with rehearsal(count, TIMING, owned, **config) as running:
            await test(running)

    in_fake_time(play())


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


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
)
@pytest.mark.parametrize("health", ["erring", "hung"])
def test_a_server_that_fails_in_an_update_gets_it_later(path: str, health: str) -> None:
    async def play(running: Rehearsal) -> None:
        broken = running.server(0)
        broken.broken[path] = health
        await running.update()
        assert running.states == ["suspect", "ready"]
        assert running.fleet.workers[0].tag is None
        assert await request(running) == "run:2"
        broken.broken.clear()
        await running.all_ready()
        assert running.holds_current(broken)
        assert not broken.open_session
        assert not broken.paused

    scenario(play)


def test_a_stale_server_that_cannot_be_restored_is_given_up(moves: list[tuple[str, str]]) -> None:
    async def play(running: Rehearsal) -> None:
        broken = running.server(0)
        broken.broken["/update_weights_from_tensor"] = "erring"
        broken.restart()
        moves.clear()
        await running.until(lambda: running.states[0] == "down")
        assert ("stale", "suspect") in moves
        broken.broken.clear()
        await running.all_ready()

    scenario(play)


def test_wrong_tensors_are_seen_by_comparison_with_another_server() -> None:
    async def play(running: Rehearsal) -> None:
        wrong = running.server(0)
        wrong.restart()
        await running.until(lambda: running.states[0] == "stale")
        held = wrong.held
        # what arrives is thrown away, though the server confirms the version
        await running.until(lambda: wrong.held != held)
        wrong.received = ""
        await running.until(lambda: running.states[0] == "suspect")
        assert "1 tensors differ from http://given:1" in running.fleet.workers[0].reason
        await running.all_ready()
        assert running.holds_current(wrong)

    scenario(play)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "/pause_generation",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/update_weight_version",
        "/end_weight_update",
        "/flush_cache?timeout=30",
        "/continue_generation",
    ],
)
def test_a_server_restarted_within_an_update_never_counts_as_updated(path: str, restored: bool) -> None:
    """In no time, after each call: only the process that took every tensor may bear the version's name."""

    async def play(running: Rehearsal) -> None:
        server, worker = running.server(0), running.fleet.workers[0]
        checking = asyncio.create_task(keep_checking(running))
        if restored:
            server.restart()
            await running.until(lambda: worker.state == "stale")
            server.restart_after = path
        else:
            server.restart_after = path
            await running.update()
            check_sound(running)
        await running.until(lambda: server.restart_after is None)
        await running.all_ready()
        assert running.holds_current(server)
        assert server.version == running.fleet.tag
        assert not checking.done(), checking.exception()
        checking.cancel()

    scenario(play, count=1)


def test_a_server_restarted_behind_our_back_is_no_witness_against_another() -> None:
    async def play(running: Rehearsal) -> None:
        first, second = running.fleet.workers
        running.server(0).restart()
        await running.until(lambda: first.state == "stale")
        running.server(1).restart()
        await running.until(lambda: second.state == "stale")
        await running.all_ready()
        assert first.trouble == ""
        assert all(running.holds_current(server) for server in running.servers.values())

    scenario(play)


def test_a_server_in_an_update_that_was_given_up_holds_no_version() -> None:
    async def play(running: Rehearsal) -> None:
        await running.updates.begin()
        running.server(0).held = "of two versions"
        running.updates.end(None, None, [], {})
        assert [worker.tag for worker in running.fleet.workers] == [None, None]
        await running.update()
        await running.all_ready()

    scenario(play)


def test_a_server_that_does_not_abort_is_lost_and_its_request_sent_elsewhere() -> None:
    async def play(running: Rehearsal) -> None:
        first = running.fleet.workers[0]
        stuck = asyncio.create_task(request(running, first, seconds=1e4))
        await asyncio.sleep(0.5)
        begun = asyncio.get_running_loop().time()
        await running.update()
        assert TIMING.drain_s <= asyncio.get_running_loop().time() - begun < TIMING.drain_s + 2.0
        assert "did not abort its requests within 5 s" in first.trouble
        stuck.cancel()
        await running.all_ready()

    scenario(play)


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


def test_the_checkpoint_is_not_what_an_update_gives() -> None:
    """The scripted servers can tell weights apart, on which these tests rest."""

    async def play(running: Rehearsal) -> None:
        before = running.server(0).held
        assert running.holds_current(running.server(0))
        await running.update()
        assert running.server(0).held not in (before, ON_DISK)
        running.server(0).restart()
        assert not running.holds_current(running.server(0))

    scenario(play)
