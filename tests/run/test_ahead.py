"""Batches that rank 0 samples ahead by itself: whole, in the order of their prompts, and none behind one that failed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gtpo_megatron.data.prompts import Prompt
from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.errors import UserError
from tests.parallel.pool import RankPool
from tests.run.light_run import Engine, ids_of, light_run
from tests.run.test_rounds import replaced_and_killed

MANY = 400


def picky_run(directory: Path, engine: Engine, staleness: int) -> Any:
    """A run that replaces the prompts of odd number, with more of them than it will need."""
    dynamic = {"enabled": True, "max_rounds": 8}
    run = light_run(directory, engine, picky=True, staleness=staleness, dynamic_sampling=dynamic)
    run.sampler = PromptSampler(MANY, 0, True, "fingerprint")
    questions = (Prompt(f"row-{i}", f"question {i}", str(i), None, (i + 3,)) for i in range(MANY))
    run.prompts = SimpleNamespace(prompts=tuple(questions))
    return run


def calls_of_a_step(directory: Path) -> tuple[int, int, int]:
    """Calls of the engine when all that may be sampled beside the first step is, when the second begins, and in all."""
    from gtpo_megatron.run.batches import Batches

    engine = Engine(ahead=2)
    run = picky_run(directory, engine, staleness=2)
    with Batches(run) as batches:
        batches.next()
        batches._thread.submit(lambda: None).result()  # behind all that is ahead
        beside = engine.calls
        run.step = 1
        batch = batches._finish(1)
        assert len({t.group for t in batch}) == 2
        assert all(any(t.advantage for t in batch if t.group == group) for group in range(2))
        return beside, engine.calls, len(batches._ahead)


def test_a_batch_ahead_has_its_replacements_before_its_step_comes(ranks: RankPool, tmp_path: Path) -> None:
    ((beside, after, left),) = ranks.run(1, calls_of_a_step, tmp_path)
    assert beside == after > 3  # three batches, of which some needed more than a round
    assert left == 1


def test_prompts_and_replacements_do_not_depend_on_how_far_ahead_they_are_sampled(
    ranks: RankPool, tmp_path: Path
) -> None:
    runs = [
        ranks.run(1, replaced_and_killed, tmp_path / str(ahead), ahead, None)[0][0] for ahead in (0, 1, 2, 3)
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3]


def failing(directory: Path) -> tuple[list[str], str, int, list[int], list[int]]:
    from gtpo_megatron.run.batches import Batches

    engine = Engine(fails_at=1, ahead=2)
    run = light_run(directory, engine, staleness=2)
    with Batches(run) as batches:
        first = ids_of(batches.next())
        run.step = 1
        try:
            batches.next()
        except UserError as error:
            sampler = PromptSampler(20, 0, True, "fingerprint")
            sampler.load_state_dict(batches.sampler_state)
            return first, str(error), engine.calls, sampler.next(4), PromptSampler(20, 0, True).next(6)[2:]
    raise AssertionError("no error")


def test_behind_a_batch_that_failed_none_is_sampled_and_its_prompts_stay_the_next(
    ranks: RankPool, tmp_path: Path
) -> None:
    ((_, message, calls, following, expected),) = ranks.run(1, failing, tmp_path)
    assert (message, calls) == ("no server left", 2)
    assert following == expected


def shared_and_far_ahead(directory: Path) -> str:
    from gtpo_megatron.run.batches import Batches

    engine = Engine()
    try:
        Batches(light_run(directory, engine, staleness=2))
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


def test_an_engine_on_every_rank_goes_no_further_than_one_batch(ranks: RankPool, tmp_path: Path) -> None:
    assert "one batch ahead at most" in ranks.run(1, shared_and_far_ahead, tmp_path)[0]


def on_two_ranks(directory: Path, staleness: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Three batches of rank 0's engine, which other ranks lack."""
    import torch.distributed as dist

    from gtpo_megatron.run.batches import Batches

    engine = Engine(ahead=2) if dist.get_rank() == 0 else None
    run = picky_run(directory, engine, staleness)
    with Batches(run) as batches:
        taken = []
        for run.step in range(3):
            taken.append(ids_of(batches.next()))
        return taken, batches.sampler_state


def test_other_ranks_know_where_the_prompts_stand(ranks: RankPool, tmp_path: Path) -> None:
    (alone, expected), *_ = ranks.run(1, on_two_ranks, tmp_path / "one", 2)
    for staleness in (0, 2):
        first, second = ranks.run(2, on_two_ranks, tmp_path / f"two-{staleness}", staleness)
        assert first == (alone, expected)
        assert second == ([[], [], []], expected)
