"""The order before the engine: who is next, what an update waits for, and the slack that batches ahead give it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from gtpo_megatron.rollout.protocol import Group, PromptRequest, SamplingParams
from gtpo_megatron.run.queue import EngineQueue, Job, Place
from tests.parallel.pool import RankPool
from tests.run.light_run import Engine, ids_of, light_run

LIMIT_S = 30.0  # for what happens at once


class Rehearsal:
    """Jobs that begin when their turn comes, and end when they are told to."""

    def __init__(self) -> None:
        self.queue = EngineQueue()
        self.begun: list[str] = []
        self._ends: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()

    def add(self, job: Job, step: int = 0, *, beside: bool = False) -> None:
        place = self.queue.enter(job, step, beside=beside)
        self._ends[str(place)] = threading.Event()
        thread = threading.Thread(target=self._work, args=(place,))
        thread.start()
        self._threads.append(thread)

    def _work(self, place: Place) -> None:
        with self.queue.turn(place):
            with self._changed:
                self.begun.append(str(place))
                self._changed.notify_all()
            assert self._ends[str(place)].wait(LIMIT_S)

    def end(self, name: str, begun: int) -> None:
        """End a job, and wait until so many have begun."""
        self._ends[name].set()
        self.wait(begun)

    def wait(self, begun: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) == begun, LIMIT_S)

    def finish(self) -> None:
        for end in self._ends.values():
            end.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def test_the_most_urgent_that_waits_is_next() -> None:
    jobs = Rehearsal()
    jobs.add(Job.BATCH, 1)
    jobs.wait(1)
    for job, step in [
        (Job.BATCH, 3),
        (Job.BATCH, 2),
        (Job.REPLACEMENT, 1),
        (Job.EVALUATION, 0),
        (Job.UPDATE, 0),
    ]:
        jobs.add(job, step)
    order = [
        "the batch of step 2",
        "new weights",
        "the evaluation",
        "replacements for the batch of step 2",
        "the batch of step 3",
        "the batch of step 4",
    ]
    for number, name in enumerate(order[:-1], start=1):
        assert jobs.begun == order[:number]
        jobs.end(name, number + 1)
    assert jobs.begun == order
    jobs.finish()


def test_an_update_that_may_interrupt_goes_beside_and_lets_nobody_else_begin() -> None:
    jobs = Rehearsal()
    jobs.add(Job.BATCH, 1)
    jobs.wait(1)
    jobs.add(Job.BATCH, 2)
    jobs.add(Job.UPDATE, beside=True)
    jobs.wait(2)
    assert jobs.begun[1] == "new weights"
    jobs._ends["the batch of step 2"].set()
    jobs._threads[0].join(LIMIT_S)
    assert len(jobs.begun) == 2  # the next batch waits for the update, though the engine is free
    jobs.end("new weights", 3)
    assert jobs.begun[2] == "the batch of step 3"
    jobs.finish()


def test_what_training_waits_for_is_said() -> None:
    queue = EngineQueue()
    batch = queue.enter(Job.BATCH, 4)
    assert queue.waits_for() == ""
    queue.enter(Job.BATCH, 5)
    assert queue.waits_for() == ""  # training does not stand still for a batch ahead
    update = queue.enter(Job.UPDATE)
    assert queue.waits_for() == "the engine, which is busy with the batch of step 5"
    queue.leave(batch)
    assert queue.waits_for() == "" and update.since >= batch.since > 0


def test_a_place_that_is_given_up_holds_nobody_up() -> None:
    queue = EngineQueue()
    first, second, third = (queue.enter(Job.BATCH, step) for step in range(3))
    queue.leave(second)
    queue.leave(second)
    with queue.turn(first):
        pass
    with pytest.raises(KeyError), queue.turn(third):
        raise KeyError
    with queue.turn(queue.enter(Job.UPDATE)):
        pass


class PacedEngine(Engine):
    """Begins a batch when it is called and ends it when a test lets it: `begun` and `ended` in order."""

    def __init__(self) -> None:
        super().__init__(ahead=2)
        self.begun = 0
        self.allowed = 0
        self.versions: list[int] = []
        self.changed = threading.Condition()

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        with self.changed:
            self.begun += 1
            number = self.begun
            self.versions.append(self.version)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.allowed >= number, LIMIT_S)
        yield from super().generate(requests, params)

    def allow(self, batches: int, begun: int) -> None:
        """Let so many batches end, and wait until so many have begun."""
        with self.changed:
            self.allowed = batches
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.begun >= begun, LIMIT_S), self.begun


def slack(directory: Path) -> tuple[list[int], list[str]]:
    """Four steps with two batches ahead, the engine always in the middle of a batch when an update comes."""
    from gtpo_megatron.run.batches import Batches

    engine = PacedEngine()
    run = light_run(directory, engine, staleness=2)
    taken: list[str] = []
    with Batches(run) as batches, ExitStack() as stack:
        stack.callback(engine.allow, 100, 0)
        for run.step in range(4):
            engine.allow(run.step + 1, 0)
            taken += ids_of(batches.next())
            engine.allow(
                run.step + 1, run.step + 2
            )  # the next is being sampled, and one more waits behind it
            update = run.queue.enter(Job.UPDATE)
            assert update.since == 0.0
            engine.allow(run.step + 2, run.step + 2)  # it ends
            with run.queue.turn(update):
                assert engine.begun == run.step + 2  # the one behind it did not get ahead of the update
                engine.version += 1
    return engine.versions, taken


def test_with_two_batches_ahead_an_update_waits_for_one_batch_alone(ranks: RankPool, tmp_path: Path) -> None:
    """Though another has waited longer. Each batch is sampled with the newest weights that there are when it begins."""
    ((versions, taken),) = ranks.run(1, slack, tmp_path)
    assert versions[:6] == [0, 0, 1, 2, 3, 4]
    assert len(set(taken)) == 8


def interrupting(directory: Path) -> tuple[int, bool]:
    """An update comes in the middle of a batch ahead: how many had begun at its turn, and if another did during it."""
    from gtpo_megatron.run.batches import Batches

    engine = PacedEngine()
    run = light_run(directory, engine, staleness=2)
    with Batches(run) as batches, ExitStack() as stack:
        stack.callback(engine.allow, 100, 0)
        engine.allow(1, 0)
        batches.next()
        engine.allow(1, 2)
        with run.queue.turn(run.queue.enter(Job.UPDATE, beside=True)):
            begun = engine.begun
            engine.allow(2, 2)
            batches._ahead[1]()
            return begun, engine.begun > begun


def test_an_update_that_interrupts_waits_for_no_batch(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, interrupting, tmp_path) == [(2, False)]
