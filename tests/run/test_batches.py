"""Batches in order: sampled now, ahead, or read back; no prompt is lost or taken twice."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Group, PromptRequest, SamplingParams
from tests.parallel.pool import RankPool
from tests.run.light_run import PROMPTS, Engine, Signals, ids_of, in_order, light_run, said


def test_sampling_ahead_takes_the_same_prompts(ranks: RankPool, tmp_path: Path) -> None:
    taken = [ranks.run(1, in_order, tmp_path / str(ahead), ahead)[0] for ahead in (0, 1, 3)]
    assert taken[0] == taken[1] == taken[2]
    everything = [prompt for batch in taken[0] for prompt in batch]
    assert len(set(everything)) == len(everything) == 12


def settled_each_step(directory: Path, staleness: int) -> tuple[list[list[str]], list[list[int]]]:
    """What each of six steps takes, and the batches that are stored once it has settled."""
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(ahead=staleness), staleness=staleness)
    taken, stored = [], []
    with Batches(run) as batches:
        for run.step in range(6):
            taken.append(ids_of(batches.next()))
            batches.settle()
            stored.append(run.store.steps())
    return taken, stored


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_more_is_sampled_ahead_than_staleness_and_the_steps_of_a_run_allow(
    ranks: RankPool, tmp_path: Path, staleness: int
) -> None:
    expected = ranks.run(1, in_order, tmp_path / "whole", 0)[0]
    ((taken, stored),) = ranks.run(1, settled_each_step, tmp_path / "settled", staleness)
    assert taken == expected  # a batch that is read back does not set the sampler back
    assert stored == [list(range(min(step + 1 + staleness, 6))) for step in range(6)]


class HeldEngine(Engine):
    """Samples no batch ahead before it is let go."""

    def __init__(self) -> None:
        super().__init__(ahead=3)
        self.let_go = threading.Event()
        self.prompts: list[tuple[int, ...]] = []

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        if self.calls:
            assert self.let_go.wait(60)
        self.prompts += [request.prompt_ids for request in requests]
        yield from super().generate(requests, params)


def held(directory: Path) -> tuple[int, list[tuple[int, ...]]]:
    """With three batches ahead: threads that sample, and the prompts in the order in which they are sampled."""
    from gtpo_megatron.run.batches import Batches

    engine = HeldEngine()
    with Batches(light_run(directory, engine, staleness=3)) as batches:
        batches.next()
        threads = sum(thread.name.startswith("rollout") for thread in threading.enumerate())
        engine.let_go.set()
        batches.settle()
    return threads, engine.prompts


def test_batches_ahead_are_sampled_one_after_the_other(ranks: RankPool, tmp_path: Path) -> None:
    ((threads, prompts),) = ranks.run(1, held, tmp_path)
    assert threads == 1
    assert prompts == [(index + 3,) for index in PromptSampler(PROMPTS, 0, True).next(8)]


def left_with_batches_ahead(directory: Path, staleness: int) -> tuple[int, float, float, float]:
    """Two steps with an engine on rank 0 alone: how often it was told to abort; tokens and seconds of the first batch; seconds in all."""
    import torch.distributed as dist

    from gtpo_megatron.run.batches import Batches

    engine = Engine(ahead=2)
    run = light_run(directory, engine, staleness=staleness)
    if dist.get_rank():
        run.engine = None
    started = time.perf_counter()
    with Batches(run) as batches:
        for run.step in range(2):
            batches.next()
        sampled = batches.sampled(0)
        assert batches.sampled(0) is None  # it is handed out once
    seconds = time.perf_counter() - started
    return engine.aborted, *((sampled.amount, sampled.seconds) if sampled else (0, 0)), seconds


@pytest.mark.parametrize("staleness", [0, 1])
def test_leaving_aborts_what_is_under_way_and_only_that(
    ranks: RankPool, tmp_path: Path, staleness: int
) -> None:
    first, second = ranks.run(2, left_with_batches_ahead, tmp_path, staleness)
    aborted, tokens, seconds, whole = first
    assert (aborted, tokens) == (staleness, 2 * 4 * 6)
    assert 0 < seconds < whole
    assert second[:3] == (0, 0, 0)


def of_the_data_set(directory: Path) -> list[tuple[str, int, str]]:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine())
    algorithm = run.config.algorithm.model_copy(update={"name": "sft"})
    run.config = run.config.model_copy(update={"algorithm": algorithm})
    with Batches(run) as batches:
        return [(t.prompt_id, t.step, t.finish_reason) for t in batches.next()]


def test_supervised_batches_are_the_data_sets_own_on_rank_zero(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, of_the_data_set, tmp_path)
    order = PromptSampler(PROMPTS, 0, True).next(4)
    assert first == [(f"row-{index}", 0, "data") for index in order]
    assert second == []


def interrupted(directory: Path, settle: bool) -> tuple[list[list[str]], list[list[str]], list[int], int]:
    """Three steps with two ahead, then a new process from the checkpoint after the second: what each took."""
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(ahead=2), staleness=2)
    before, after = [], []
    with Batches(run) as batches:
        for run.step in range(3):
            before.append(ids_of(batches.next()))
            if run.step == 1:
                if settle:
                    batches.settle()
                state = batches.sampler_state
    stored = run.store.steps()
    engine = Engine(ahead=2)
    resumed = light_run(directory, engine, step=2, staleness=2)
    resumed.sampler.load_state_dict(state)
    with Batches(resumed) as batches:
        for resumed.step in range(2, 6):
            after.append(ids_of(batches.next()))
    return before, after, stored, engine.calls


def test_a_run_goes_on_with_what_is_stored_and_what_is_not(ranks: RankPool, tmp_path: Path) -> None:
    expected = ranks.run(1, in_order, tmp_path / "whole", 0)[0]
    for settle, stored in ((True, [0, 1, 2, 3]), (False, [0, 1, 2])):
        directory = tmp_path / f"settle-{settle}"
        ((before, after, found, calls),) = ranks.run(1, interrupted, directory, settle)
        assert (before, after) == (expected[:3], expected[2:])
        assert found == stored
        assert calls == 6 - len(stored)  # nothing that is stored is sampled again


class StoppedEngine(Engine):
    """A signal comes in the middle of a call, counted from 0; from then on it samples nothing."""

    def __init__(self, signals: Signals, at: int, ahead: int) -> None:
        super().__init__(ahead=ahead)
        self.signals, self.at = signals, at

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        whole = list(super().generate(requests, params))
        self.signals.asked = self.signals.asked or self.calls > self.at
        yield from whole[: len(whole) // 2] if self.signals.asked else whole


def stopped(directory: Path, staleness: int, at: int, rank: int) -> tuple[list[list[str]], int, list[int]]:
    """Six batches of two processes: the first stops when a signal reaches one rank in its call number `at`."""
    import torch.distributed as dist

    from gtpo_megatron.run.batches import Batches
    from gtpo_megatron.run.signals import Interrupted

    run, taken = light_run(directory, Engine(ahead=staleness), staleness=staleness), []
    if dist.get_rank() == rank:
        run.engine = StoppedEngine(run.signals, at, staleness)
    with Batches(run) as batches:
        said = rf"^step {at + 1}: sampling was cut short$|^sampling was cut short on another rank$"
        with pytest.raises(Interrupted, match=said):
            for run.step in range(6):
                taken.append(ids_of(batches.next()))
        batches.settle()
    state, stored, begun = batches.sampler_state, run.store.steps(), run.step
    dist.barrier()
    resumed = light_run(directory, Engine(ahead=staleness), staleness=staleness)
    resumed.sampler.load_state_dict(state)
    with Batches(resumed) as batches:
        for resumed.step in range(begun, 6):
            taken.append(ids_of(batches.next()))
    return taken, begun, stored


@pytest.mark.parametrize(
    ("world", "staleness", "at", "rank"),
    [(1, 0, 0, 0), (1, 0, 3, 0), (1, 2, 3, 0), (2, 0, 2, 1), (2, 1, 2, 0)],
)
def test_a_signal_during_sampling_drops_the_batch_on_all_ranks_and_loses_no_prompt(
    world: int, staleness: int, at: int, rank: int, ranks: RankPool, tmp_path: Path
) -> None:
    expected = ranks.run(1, in_order, tmp_path / "whole", 0)[0]
    answers = ranks.run(world, stopped, tmp_path / "stopped", staleness, at, rank)
    assert answers[0] == (expected, at, list(range(at)))  # the call for a batch has its number
    assert [begun for _, begun, _ in answers] == [at] * world


def asked_when_it_is_whole(directory: Path, oversample: float) -> list[str]:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(), oversample=oversample)
    run.signals.asked = True
    with Batches(run) as batches:
        return ids_of(batches.next())


@pytest.mark.parametrize("oversample", [1.0, 1.5])
def test_a_batch_that_is_whole_is_kept_when_a_signal_comes(
    ranks: RankPool, tmp_path: Path, oversample: float
) -> None:
    (taken,) = ranks.run(1, asked_when_it_is_whole, tmp_path, oversample)
    assert taken == [f"row-{index}" for index in PromptSampler(PROMPTS, 0, True).next(2)]


def failed_beside_a_stop(directory: Path) -> tuple[str, list[str]]:
    """A step in which sampling fails on rank 0 while a signal cuts it short on rank 1: how it ends, and what is logged."""
    import torch.distributed as dist

    from gtpo_megatron.run.batches import Batches
    from gtpo_megatron.run.signals import Interrupted

    run = light_run(directory, Engine(fails_at=0))
    if dist.get_rank() == 1:
        run.engine = StoppedEngine(run.signals, 0, 0)
    with Batches(run) as batches, said() as messages, pytest.raises(Interrupted) as end:
        batches.next()
    return str(end.value), messages


def test_an_error_beside_a_stop_is_reported_where_it_happened(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, failed_beside_a_stop, tmp_path)
    assert first == (
        "sampling was cut short on another rank",
        ["dropped with the batch that the stop cut short: no server left"],
    )
    assert second == ("step 1: sampling was cut short", [])


def failing_ahead(directory: Path) -> tuple[list[str], str, dict[str, Any], dict[str, Any]]:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(fails_at=1), staleness=1)
    with Batches(run) as batches:
        first = ids_of(batches.next())
        behind_first = run.store.read_notes(0)["sampler"]
        run.step = 1
        try:
            batches.next()
        except UserError as error:
            return first, str(error), batches.sampler_state, behind_first
    raise AssertionError("no error")


def test_an_error_of_sampling_ahead_reaches_its_step_and_loses_no_prompt(
    ranks: RankPool, tmp_path: Path
) -> None:
    ((_, message, state, behind_first),) = ranks.run(1, failing_ahead, tmp_path)
    assert message == "no server left"
    orders = []
    for sampler_state in (state, behind_first):
        sampler = PromptSampler(PROMPTS, 0, True, "fingerprint")
        sampler.load_state_dict(sampler_state)
        orders.append(sampler.next(PROMPTS))
    assert orders[0] == orders[1]


def another_steps_file(directory: Path) -> str:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine())
    with Batches(run) as batches:
        batches.next()
    run.store.path(0).rename(run.store.path(1))
    run = light_run(directory, Engine(), step=1)
    with Batches(run) as batches:
        try:
            batches.next()
        except UserError as error:
            return str(error)
    raise AssertionError("no error")


def test_a_stored_batch_of_another_step_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    (message,) = ranks.run(1, another_steps_file, tmp_path)
    assert "step-00000001.parquet" in message and "of step 0, not of step 1" in message
