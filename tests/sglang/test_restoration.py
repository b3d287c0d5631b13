"""Servers that missed an update: brought to it together, beside sampling, and never in the way of the next update."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from gtpo_megatron.errors import UserError
from tests.sglang.scripted import TIMING, FakeServer, Rehearsal, check_sound, in_fake_time, rehearsal, request

BUCKET = "/update_weights_from_tensor"  # two an update


def scenario(test: Callable[[Rehearsal], Awaitable[None]], count: int, **config: object) -> None:
    """Play a scenario on servers that are ready with the first update's weights."""

    async def play() -> None:
        async with rehearsal(count, TIMING, **config) as running:
            await test(running)

    in_fake_time(play())


def times(server: FakeServer, path: str, since: float = 0.0) -> list[float]:
    return [time for time, asked in server.asked if asked == path and time >= since]


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("pauses", [(0.0, 0.0, 0.0), (0.0, 0.4, 0.8)], ids=["at once", "one after the other"])
def test_servers_that_are_lost_together_are_restored_in_one_transfer(pauses: Sequence[float]) -> None:
    """Three of four are restarted behind our back; some take longer than others until they answer."""

    async def play(running: Rehearsal) -> None:
        begun = now()
        for worker in running.fleet.workers[:3]:
            running.server(worker.index).restart()
            running.server(worker.index).broken["/health"] = "erring"
            running.fleet.suspect(worker, "a request failed")
        for i, pause in enumerate(pauses):
            asyncio.get_running_loop().call_later(pause, running.server(i).broken.clear)
        assert await request(running) == "run:1"  # of the one that is left
        await running.all_ready()
        for path in ("/begin_weight_update", BUCKET, "/end_weight_update"):
            sent = [times(running.server(i), path, begun) for i in range(3)]
            assert sent[0] == sent[1] == sent[2]
            assert len(sent[0]) == (2 if path == BUCKET else 1)
            assert times(running.server(3), path, begun) == []
        assert len(times(running.server(3), "/weights_checker", begun)) == 1  # one witness for all of them
        check_sound(running)

    scenario(play, count=4)


def test_a_lone_server_waits_for_nobody() -> None:
    async def play(running: Rehearsal) -> None:
        begun = now()
        running.server(0).restart()
        running.fleet.outdated(running.fleet.workers[0], "default")
        await running.until(lambda: bool(times(running.server(0), BUCKET, begun)))
        assert now() - begun < TIMING.gather_s / 2
        await running.all_ready()

    scenario(play, count=2)


def test_a_server_that_comes_too_late_is_in_the_next_round() -> None:
    async def play(running: Rehearsal) -> None:
        begun, (first, second, _) = now(), running.fleet.workers
        for worker in (first, second):
            running.server(worker.index).restart()
        running.fleet.outdated(first, "default")
        await running.until(lambda: bool(times(running.server(0), BUCKET, begun)))
        running.fleet.outdated(second, "default")
        await running.all_ready()
        assert running.holds_current(running.server(0)) and running.holds_current(running.server(1))
        assert times(running.server(1), BUCKET)[-2] > times(running.server(0), "/end_weight_update")[-1]

    scenario(play, count=3)


@pytest.mark.parametrize(
    "path", [BUCKET, "/end_weight_update", "/weights_checker"], ids=["a bucket", "the end", "the comparison"]
)
def test_an_update_does_not_wait_for_a_restoration(path: str) -> None:
    """It gives way, and its server gets the new weights with the others."""

    async def play(running: Rehearsal) -> None:
        late, begun = running.server(0), now()
        late.restart()
        running.fleet.outdated(running.fleet.workers[0], "default")
        await running.until(lambda: bool(times(late, path, begun)), step_s=0.001)
        started = now()
        await running.update()
        assert now() - started < 0.2  # a call takes 0.01 s
        assert running.states == ["ready"] * 3
        assert running.holds_current(late) and late.version == "run:2"
        assert not late.open_session and not late.paused
        await asyncio.sleep(60.0)
        assert running.states == ["ready"] * 3

    scenario(play, count=3)


def test_a_server_that_hangs_while_it_is_restored_holds_an_update_up_for_control_s_alone() -> None:
    async def play(running: Rehearsal) -> None:
        begun, hung, sound = now(), running.server(0), running.server(1)
        for i in (0, 1):
            running.server(i).restart()
        hung.broken[BUCKET] = "hung"
        for worker in running.fleet.workers[:2]:
            running.fleet.outdated(worker, "default")
        await running.until(lambda: bool(times(sound, BUCKET, begun)))
        begun = now()
        await running.update()
        assert TIMING.control_s < now() - begun < TIMING.control_s + 0.2
        assert running.states[2] == "ready" and running.holds_current(running.server(2))
        assert "had not taken weights 3 s after an update began" in running.fleet.workers[0].trouble
        hung.broken.clear()
        await running.all_ready()
        assert running.holds_current(hung) and running.holds_current(sound)

    scenario(play, count=3)


def test_one_of_several_that_fails_while_they_are_restored_costs_the_others_nothing() -> None:
    async def play(running: Rehearsal) -> None:
        begun = now()
        for worker in running.fleet.workers[:3]:
            running.server(worker.index).restart()
        running.server(1).broken[BUCKET] = "erring"
        for worker in running.fleet.workers[:3]:
            running.fleet.outdated(worker, "default")
        await running.until(lambda: running.states[0] == running.states[2] == "ready")
        assert running.states[1] != "ready"
        assert len(times(running.server(0), "/begin_weight_update", begun)) == 1
        running.server(1).broken.clear()
        await running.all_ready()
        assert running.holds_current(running.server(1))

    scenario(play, count=4)


def test_where_none_is_left_the_first_restored_is_the_witness_of_the_others() -> None:
    async def play(running: Rehearsal) -> None:
        for worker in running.fleet.workers:
            running.server(worker.index).restart()
        wrong = running.server(1)
        held = wrong.held
        for worker in running.fleet.workers:
            running.fleet.outdated(worker, "default")
        await running.until(lambda: wrong.held != held)
        wrong.received = ""  # what arrives is thrown away
        await running.until(lambda: running.states[1] == "suspect")
        assert "1 tensors differ from http://given:0" in running.fleet.workers[1].reason
        assert running.states[0] == running.states[2] == "ready"
        await running.all_ready()

    scenario(play, count=3)


def test_a_server_that_cannot_be_compared_with_another_is_not_asked_for_checksums() -> None:
    async def play(running: Rehearsal) -> None:
        running.server(0).restart()
        running.server(0).broken["/weights_checker"] = "erring"
        await running.until(lambda: running.states == ["stale"])
        await running.all_ready()
        assert running.holds_current(running.server(0))
        assert times(running.server(0), "/weights_checker") == []

    scenario(play, count=1)


def lose(running: Rehearsal, count: int) -> None:
    """So many servers die in the next update's last call."""
    for i in range(count):
        running.server(i).broken["/end_weight_update"] = "erring"


@pytest.mark.parametrize(
    ("quorum", "lost", "enough"),
    [
        (1, 3, True),
        (1, 4, False),
        (3, 1, True),
        (3, 2, False),
        ("50%", 2, True),
        ("51%", 2, False),
        ("100%", 1, False),
    ],
)
def test_an_update_is_done_when_a_quorum_has_it(quorum: int | str, lost: int, enough: bool) -> None:
    """The others are brought to it later: none of them holds sampling up."""

    async def play(running: Rehearsal) -> None:
        lose(running, lost)
        for i in range(lost):
            running.server(i).broken["/health"] = "hung"
        await running.update()
        begun = now()
        waiting = asyncio.create_task(running.updates.wait_for_quorum())
        await asyncio.sleep(0.2)
        assert waiting.done() == enough
        if not enough:
            said = f"{4 - lost} of 4 servers hold the current weights, {running.fleet._config.needed(4)} are needed"
            assert running.fleet.troubles()[0] == f"{said} (rollout.sglang.quorum: {quorum})"
            await asyncio.sleep(20.0)
            assert not waiting.done()
        for i in range(lost):
            running.server(i).broken.clear()
        await waiting
        assert len(running.fleet.ready) >= running.fleet._config.needed(4)
        assert now() - begun < (0.5 if enough else 60.0)
        assert "quorum" not in "".join(running.fleet.troubles())
        await running.all_ready()
        assert all(running.holds_current(server) for server in running.servers.values())

    scenario(play, count=4, quorum=quorum)


def test_without_a_quorum_the_run_waits_so_long_and_stops_with_the_names() -> None:
    async def play(running: Rehearsal) -> None:
        for i in range(2):
            running.server(i).health = "dead"
        await running.update()
        begun = now()
        said = r"too few SGLang servers have been usable for 50 s(.|\n)*1 of 3 servers hold (.|\n)*given:0: (.|\n)*given:1: "
        with pytest.raises(UserError, match=said):
            await running.updates.wait_for_quorum()
        assert 50.0 < now() - begun < 51.0
        assert running.fleet.shortage == ""

    scenario(play, count=3, quorum=2, no_server_timeout_s=50.0)
