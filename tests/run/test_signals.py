"""A signal to one rank reaches all: those that listen at once, the others when they agree."""

import os
import signal
import threading
import time
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from tests.parallel.pool import RankPool


def asked(number: int, listeners: Sequence[int]) -> tuple[bool, bool, bool]:
    """The last rank gets a signal. Whether this one hears of it by itself, agrees, and then acts on it."""
    from gtpo_megatron.run.signals import StopSignals

    stopping = threading.Event()
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    before = signal.getsignal(number)
    with StopSignals(stopping.set, listen=rank in listeners) as signals:
        assert not signals.agree()
        if rank == last:
            os.kill(os.getpid(), number)
        heard = (rank in listeners or rank == last) and stopping.wait(60)
        dist.barrier()  # all who can know do
        unasked = not signals.asked
        agreed = signals.agree()
        acted = stopping.wait(60) and signals.asked
    assert signal.getsignal(number) == before
    assert heard != unasked
    return heard, agreed, acted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_one_signal_reaches_every_rank(number: int, ranks: RankPool) -> None:
    assert ranks.run(3, asked, number, [0]) == [(True, True, True), (False, True, True), (True, True, True)]


def test_a_world_of_one_needs_nobody(ranks: RankPool) -> None:
    assert ranks.run(1, asked, signal.SIGTERM, []) == [(True, True, True)]


def asked_twice() -> bool:
    from gtpo_megatron.run.signals import StopSignals

    with StopSignals(lambda: None, listen=False):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            return True
    return False


def test_ctrl_c_twice_is_at_once(ranks: RankPool) -> None:
    assert ranks.run(1, asked_twice) == [True]


def asked_while_it_starts(number: int) -> tuple[bool, bool]:
    """Whether the run stops, and the next of this process."""
    from gtpo_megatron.run.held_back import hold_back_stop
    from gtpo_megatron.run.signals import StopSignals

    before = signal.getsignal(number)
    try:
        hold_back_stop()
        os.kill(os.getpid(), number)  # would end it
        stopping = threading.Event()
        with StopSignals(stopping.set, listen=False) as signals:
            stops = stopping.wait(60) and signals.asked
        with StopSignals(lambda: None, listen=False) as signals:
            return stops, signals.asked
    finally:
        signal.signal(number, before)


def test_a_rank_that_is_asked_while_it_starts_stops_when_the_run_is_open(ranks: RankPool) -> None:
    assert ranks.run(1, asked_while_it_starts, signal.SIGUSR1) == [(True, False)]
