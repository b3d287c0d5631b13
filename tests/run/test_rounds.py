"""Rounds of a batch: what oversampling leaves unfinished comes again, groups without signal are replaced."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gtpo_megatron.data.prompts import Prompt
from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.rollout.protocol import Group, PromptRequest, SamplingParams
from tests.parallel.pool import RankPool
from tests.run.light_run import PROMPTS, Engine, ids_of, light_run, said


def test_what_oversampling_left_is_said(ranks: RankPool, tmp_path: Path) -> None:
    (messages,) = ranks.run(1, said_of_oversampling, tmp_path)
    assert messages == [f"step {n}: 1 of 3 groups were not finished; put back" for n in (1, 2)]


def said_of_oversampling(directory: Path) -> list[str]:
    with said() as messages:
        oversampled(directory, 0, None, steps=2)
    return messages


def oversampled(directory: Path, staleness: int, restart_at: int | None, steps: int = 6) -> list[list[str]]:
    """The prompts of six batches of the two of three groups that finish first: the second and the third."""
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, LateEngine(), oversample=1.5, staleness=staleness)
    taken = []
    with Batches(run) as batches:
        for run.step in range(steps if restart_at is None else restart_at):
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


def replaced(directory: Path, rounds: int) -> tuple[list[Any], int, list[int], list[str]]:
    """A batch of four groups, how often and with which groups the engine was called, and what was logged."""
    from gtpo_megatron.run.batches import Batches

    engine = Engine()
    dynamic = {"enabled": True, "max_rounds": rounds}
    run = light_run(directory, engine, picky=True, dynamic_sampling=dynamic, prompts_per_step=4)
    with Batches(run) as batches, said() as messages:
        return batches.next(), engine.calls, engine.groups, messages


def test_groups_without_signal_are_replaced_for_some_rounds(ranks: RankPool, tmp_path: Path) -> None:
    ((batch, calls, groups, messages),) = ranks.run(1, replaced, tmp_path / "many", 8)
    assert calls > 1
    assert [(t.group, t.index) for t in batch] == [(g, i) for g in range(4) for i in range(4)]
    assert all(int(t.answer) % 2 == 0 for t in batch)
    assert all(any(t.advantage for t in batch if t.group == g) for g in range(4))
    assert groups == list(range(len(groups)))  # each has a number of its own, and so a seed
    order, expected = PromptSampler(PROMPTS, 0, True).next(PROMPTS), []
    silent, later = sum(index % 2 for index in order[:4]), order[4:]
    for _ in range(calls - 1):
        useful = sum(1 - index % 2 for index in later[:silent])
        expected.append(f"step 1: {useful} of {silent} groups without signal replaced")
        silent, later = silent - useful, later[silent:]
    assert messages == expected
    ((_, calls_of_one, _, _),) = ranks.run(1, replaced, tmp_path / "one", 1)
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
