"""Batches in order: sampled now, ahead, or read back; no prompt is lost or taken twice."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.data.prompts import Prompt
from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.errors import UserError
from gtpo_megatron.rewards.pool import Score
from gtpo_megatron.rollout.protocol import Completion, Group, PromptRequest, SamplingParams
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.parallel.pool import RankPool
from tests.tiny_models import tiny_tokenizer
from tests.training_jobs import small_run

PROMPTS = 20  # an epoch: ten steps of two prompts


class Engine:
    """Gives each prompt completions of random tokens, but an error to `fails_at`, counted in calls.

    With more than one batch ahead it is rank 0's alone.
    """

    def __init__(self, fails_at: int | None = None, ahead: int = 0) -> None:
        self.calls, self.fails_at, self.version = 0, fails_at, 0
        self.on_every_rank = ahead < 2

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            raise UserError("no server left")
        for request in requests:
            random = np.random.default_rng(request.seed)
            yield Group(request, tuple(self.complete(random) for _ in range(params.n)))

    def complete(self, random: np.random.Generator) -> Completion:
        ids = random.integers(3, 300, 6).astype(np.int32)
        versions = np.full(6, self.version, np.int32)
        return Completion(ids, np.zeros(6, np.float32), versions, "length", 0.0)

    def abort_all(self, *, for_good: bool = False) -> None:
        """Nothing is under way for long."""


class Rewards:
    """Pays the characters of a completion; nothing for the prompts of odd number where `picky`."""

    def __init__(self, picky: bool) -> None:
        self.picky = picky

    def submit(self, items: Sequence[tuple[str, str, str]]) -> Any:
        scores = [
            Score(len(set(text)) * (not (self.picky and int(answer) % 2)), {}) for text, answer, _ in items
        ]
        return SimpleNamespace(result=lambda: scores)

    def check(self, scores: Sequence[Score]) -> None:
        """None fails."""


class Signals:
    """A run's, without signals: asked to stop when a test says so."""

    asked = False

    def cut_short(self, own: bool) -> bool:
        from gtpo_megatron import control

        return control.agree(own) is not None


def light_run(directory: Path, engine: Engine, step: int = 0, picky: bool = False, **rollout: Any) -> Any:
    """As much of a run as `Batches` needs."""
    from gtpo_megatron.run.queue import EngineQueue
    from gtpo_megatron.run.run import Run

    config = small_run(directory, "run", directory, directory, rollout=rollout, training={"steps": 6})
    run = SimpleNamespace(
        config=config,
        step=step,
        engine=engine,
        queue=EngineQueue(),
        rewards=Rewards(picky),
        tokenizer=tiny_tokenizer(),
        store=TrajectoryStore(directory / "trajectories"),
        sampler=PromptSampler(PROMPTS, 0, True, "fingerprint"),
        prompts=SimpleNamespace(
            prompts=tuple(Prompt(f"row-{i}", f"question {i}", str(i), None, (i + 3,)) for i in range(PROMPTS))
        ),
        sampling_params=SamplingParams(n=config.rollout.group_size, max_new_tokens=6),
        stage=lambda name: nullcontext(),
        signals=Signals(),
    )
    run.next_prompts = lambda *args, **options: Run.next_prompts(run, *args, **options)
    return run


def ids_of(batch: Sequence[Any]) -> list[str]:
    return [t.prompt_id for t in batch if t.index == 0]


def in_order(directory: Path, staleness: int) -> list[list[str]]:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(ahead=staleness), staleness=staleness)
    taken = []
    with Batches(run) as batches:
        for run.step in range(6):
            taken.append(ids_of(batches.next()))
    assert run.store.steps() == list(range(6))
    return taken


def test_sampling_ahead_takes_the_same_prompts(ranks: RankPool, tmp_path: Path) -> None:
    taken = [ranks.run(1, in_order, tmp_path / str(ahead), ahead)[0] for ahead in (0, 1, 3)]
    assert taken[0] == taken[1] == taken[2]
    everything = [prompt for batch in taken[0] for prompt in batch]
    assert len(set(everything)) == len(everything) == 12


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


def oversampled(directory: Path, staleness: int, restart_at: int | None) -> list[list[str]]:
    """The prompts of six batches of the two of three groups that finish first: the second and the third."""
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, LateEngine(), oversample=1.5, staleness=staleness)
    taken = []
    with Batches(run) as batches:
        for run.step in range(6 if restart_at is None else restart_at):
            taken.append(ids_of(batches.next()))
        state = batches.sampler_state
    if restart_at is not None:
        run = light_run(directory, LateEngine(), restart_at, oversample=1.5, staleness=staleness)
        run.sampler.load_state_dict(state)
        with Batches(run) as batches:
            for run.step in range(restart_at, 6):
                taken.append(ids_of(batches.next()))
    return taken


class LateEngine(Engine):
    """Finishes a prompt last that it has not seen before, the first of them the very last."""

    def __init__(self) -> None:
        super().__init__(ahead=2)
        self.seen: set[tuple[int, ...]] = set()

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        late = [r for r in requests if r.prompt_ids not in self.seen]
        self.seen |= {r.prompt_ids for r in requests}
        return super().generate([r for r in requests if r not in late] + late[::-1], params)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_prompts_that_oversampling_left_unfinished_come_again(
    ranks: RankPool, tmp_path: Path, staleness: int
) -> None:
    (taken,) = ranks.run(1, oversampled, tmp_path / "whole", staleness, None)
    everything = [prompt for batch in taken for prompt in batch]
    assert len(set(everything)) == len(everything) == 12
    order = PromptSampler(PROMPTS, 0, True).next(13)
    assert len({f"row-{i}" for i in order} - set(everything)) == 1  # the one that was put back last
    for restart_at in (1, 3):
        directory = tmp_path / f"restart-{restart_at}"
        (again,) = ranks.run(1, oversampled, directory, staleness, restart_at)
        everything = [prompt for batch in again for prompt in batch]
        assert len(set(everything)) == len(everything) == 12


def replaced(directory: Path, rounds: int) -> tuple[list[Any], int]:
    from gtpo_megatron.run.batches import Batches

    engine = Engine()
    dynamic = {"enabled": True, "max_rounds": rounds}
    run = light_run(directory, engine, picky=True, dynamic_sampling=dynamic, prompts_per_step=4)
    with Batches(run) as batches:
        return batches.next(), engine.calls


def test_groups_without_signal_are_replaced_for_some_rounds(ranks: RankPool, tmp_path: Path) -> None:
    ((batch, calls),) = ranks.run(1, replaced, tmp_path / "many", 8)
    assert calls > 1
    assert [(t.group, t.index) for t in batch] == [(g, i) for g in range(4) for i in range(4)]
    assert all(int(t.answer) % 2 == 0 for t in batch)
    assert all(any(t.advantage for t in batch if t.group == g) for g in range(4))
    ((_, calls_of_one),) = ranks.run(1, replaced, tmp_path / "one", 1)
    assert calls_of_one == 2


def on_several_ranks(directory: Path, rollout: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Three batches, as (prompt, group, index, tokens, advantage), and where the sampler stands behind them."""
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(), picky=True, **rollout)
    taken = []
    with Batches(run) as batches:
        for run.step in range(3):
            batch = batches.next()
            taken += [(t.prompt_id, t.group, t.index, t.token_ids.tolist(), t.advantage) for t in batch]
    return taken, run.sampler.state_dict()


@pytest.mark.parametrize(
    "rollout",
    [
        {},
        {"dynamic_sampling": {"enabled": True, "max_rounds": 3}, "prompts_per_step": 4},
        {"staleness": 1, "prompts_per_step": 4},
    ],
)
def test_several_ranks_make_the_batches_of_one_on_rank_zero(
    ranks: RankPool, tmp_path: Path, rollout: dict[str, Any]
) -> None:
    ((alone, state),) = ranks.run(1, on_several_ranks, tmp_path / "one", rollout)
    assert len(alone) == 3 * 4 * rollout.get("prompts_per_step", 2)
    several = ranks.run(3, on_several_ranks, tmp_path / "three", rollout)
    assert [batch for batch, _ in several] == [alone, [], []]
    assert [found for _, found in several] == [state] * 3  # prompts are taken alike everywhere


def replaced_and_killed(
    directory: Path, staleness: int, killed_at: int | None
) -> tuple[list[list[str]], int]:
    """The prompts of three batches of two groups with signal; a new process goes on from the start with what is stored."""
    from gtpo_megatron.run.batches import Batches

    def run_of(step: int) -> Any:
        dynamic = {"enabled": True, "max_rounds": 8}
        run = light_run(
            directory,
            Engine(ahead=staleness),
            step,
            picky=True,
            staleness=staleness,
            dynamic_sampling=dynamic,
        )
        run.sampler = PromptSampler(400, 0, True, "fingerprint")
        questions = (Prompt(f"row-{i}", f"question {i}", str(i), None, (i + 3,)) for i in range(400))
        run.prompts = SimpleNamespace(prompts=tuple(questions))
        return run

    def walk(run: Any, last: int) -> list[list[str]]:
        with Batches(run) as batches:
            taken = []
            for run.step in range(last):
                taken.append(ids_of(batches.next()))
        return taken

    if killed_at is not None:
        walk(run_of(0), killed_at)
    run = run_of(0)
    return walk(run, 5), run.sampler.state_dict()["position"]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_replacements_are_not_taken_again_after_a_crash(
    ranks: RankPool, tmp_path: Path, staleness: int
) -> None:
    ((whole, position),) = ranks.run(1, replaced_and_killed, tmp_path / "whole", staleness, None)
    assert position > 10  # some were replaced
    assert len({prompt for batch in whole for prompt in batch}) == 10
    for killed_at in (1, 2, 3):
        directory = tmp_path / f"killed-{killed_at}"
        ((again, reached),) = ranks.run(1, replaced_and_killed, directory, staleness, killed_at)
        assert (again, reached) == (whole, position)


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
