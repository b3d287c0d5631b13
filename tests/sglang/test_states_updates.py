"""Servers that fail, hang or start again in an update, and what shows whose weights they hold; by a clock that jumps."""

import asyncio

import pytest

from tests.sglang.scenario import scenario
from tests.sglang.scripted import ON_DISK, TIMING, Rehearsal, check_sound, keep_checking, request


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
