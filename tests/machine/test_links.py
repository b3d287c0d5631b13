"""What is between nodes: here threads of one process, each a node that meets the others by the loopback interface."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gtpo_megatron.machine import links
from gtpo_megatron.machine.links import Broken, Meeting, TooLate, check_links, neighbours, stay_away

CPU = torch.device("cpu")
LIMIT_S = 20.0


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def not_bounded(peer: str, seconds: float) -> AbstractContextManager[None]:
    return nullcontext()


def told(meeting: Meeting, limit_s: float = LIMIT_S) -> list[Broken]:
    found: list[Broken] = []
    check_links(meeting, CPU, limit_s, found.append, not_bounded)
    return found


def nodes(port: int, count: int, patience_s: float = 60.0) -> list[Meeting]:
    names = ["localhost", *(f"n{n}" for n in range(1, count))]
    return [Meeting("localhost", port, count, name, patience_s) for name in names]


def together(*calls: Callable[[], list[Broken] | None]) -> list[list[Broken] | None]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(60) for future in [threads.submit(call) for call in calls]]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_nodes_that_reach_each_other_have_nothing_to_tell(port: int, count: int) -> None:
    found = together(*(lambda meeting=meeting: told(meeting) for meeting in nodes(port, count)))
    assert found == [[]] * count


def test_a_node_that_does_not_answer_is_named_by_all_others(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = links._meet

    def elsewhere(meeting: Meeting, store: dist.Store, place: links.Place | None) -> list[links.Place]:
        """n2 says a port at which it does not listen."""
        closed = replace(place, port=1) if place and place.node == "n2" else place
        roster = meet(meeting, store, closed)
        own = next(entry for entry in roster if place and entry.node == place.node)
        monkeypatch.setattr(links, "_sum_with_neighbours", lambda *_: iter(()))
        return [place if entry is own and place else entry for entry in roster]

    monkeypatch.setattr(links, "_meet", elsewhere)
    first, second, third = together(
        *(lambda meeting=meeting: told(meeting, 4.0) for meeting in nodes(port, 3))
    )
    assert first == second == [Broken("n2", "127.0.0.1 from 127.0.0.1: Connection refused")]
    assert third == []  # it reaches them


def test_a_sum_that_is_wrong_or_never_comes_names_the_neighbour(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(store: dist.Store, rank: int, device: torch.device, limit: object) -> float:
        if rank:
            raise RuntimeError("Connection closed by peer\n(and more)")
        return 2.5

    monkeypatch.setattr(links, "sum_of_two", wrong)
    first, second = together(*(lambda meeting=meeting: told(meeting) for meeting in nodes(port, 2)))
    assert first == [Broken("n1", "an all-reduce with it has a wrong sum: 2.5 for 3")]
    assert second == [Broken("localhost", "an all-reduce with it: Connection closed by peer")]


@pytest.mark.parametrize("unfit", [0, 2], ids=["the first", "the last"])
def test_a_node_that_is_unfit_keeps_nobody_waiting(port: int, unfit: int) -> None:
    meetings = nodes(port, 3)
    calls: list[Callable[[], list[Broken] | None]] = [lambda meeting=m: told(meeting) for m in meetings]
    calls[unfit] = lambda: stay_away(meetings[unfit], LIMIT_S, not_bounded)
    found = together(*calls)
    assert found.pop(unfit) is None
    assert found == [[], []]


def test_a_node_that_never_comes_is_not_waited_for_without_end_and_comes_too_late(port: int) -> None:
    first, second, third = nodes(port, 3, patience_s=0.5)
    stay = threading.Event()

    def come_late() -> list[Broken]:
        with pytest.raises(TooLate, match=r"0\.5 s after localhost"):
            told(third)
        return []

    leave = links._leave

    def keep_open(meeting: Meeting, store: dist.Store, count: int, limit_s: float) -> None:
        if meeting.presides:
            stay.wait(30)
        leave(meeting, store, count, limit_s)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(links, "_leave", keep_open)
        begun = [threads.submit(told, meeting) for meeting in (first, second)]
        assert begun[1].result(60) == []
        come_late()
        stay.set()
        assert begun[0].result(60) == []


def test_a_port_in_use_is_said_by_the_first_node_and_what_the_others_wait_for_is_bounded(port: int) -> None:
    class Ended(Exception):
        """In the place of this process."""

    @contextmanager
    def ending(peer: str, seconds: float) -> Iterator[None]:
        raise Ended(peer, seconds)
        yield

    first, second = nodes(port, 2)
    with socket.create_server(("", port)):
        with pytest.raises(RuntimeError, match=r"(?i)address already in use"):
            told(first)
        with pytest.raises(Ended) as end:  # torch waits for an answer for ever
            check_links(second, CPU, LIMIT_S, [].append, ending)
    assert end.value.args == ("localhost", 2 * links.CONNECT_S)


def test_nobody_listens_where_the_nodes_meet(port: int) -> None:
    (broken,) = told(nodes(port, 2, patience_s=0.1)[1])
    assert broken.peer == "localhost" and "Connection refused" in broken.why


def test_an_interface_without_an_address_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME=ib77: this node has no address there"):
        told(nodes(port, 2)[1])


@pytest.mark.parametrize("count", range(2, 10))
def test_everyone_has_a_neighbour_and_agrees_with_it(count: int) -> None:
    of = [neighbours(n, count) for n in range(count)]
    for turn in range(2):
        for here in range(count):
            there = of[here][turn]
            assert there is None or of[there][turn] == here != there
    assert all(any(n is not None for n in pair) for pair in of)
    linked = {frozenset((here, there)) for here in range(count) for there in of[here] if there is not None}
    assert len(linked) == count - 1  # a line


def test_a_place_says_what_others_need(port: int) -> None:
    place = links.Place("n1", "192.0.2.1", 7)
    assert links.Place(**json.loads(json.dumps(vars(place)))) == place
