"""A run's engine and reward pool, which rank 0 alone makes: what fails there ends the run on all ranks."""

import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gtpo_megatron.errors import UserError
from tests.parallel.pool import RankPool
from tests.training_jobs import small_run


class Unpicklable(RuntimeError):
    """Holds what pickle refuses, as errors of libraries do."""

    def __init__(self) -> None:
        super().__init__("a lock is in it")
        self.held = lambda: None


def opened(part: str, user_error: bool) -> tuple[str, str]:
    """(type, text) of the error on this rank, where making one part fails on rank 0."""
    import torch.distributed as dist

    from gtpo_megatron.run import run as module

    def made(name: str) -> Any:
        if name == part:
            raise UserError("no server answers") if user_error else Unpicklable()
        return SimpleNamespace(close=lambda: None, waits_for="")

    class Rewards:
        def __init__(self, _: Any) -> None:
            made("rewards")

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory)
        run = SimpleNamespace(
            config=small_run(path, "run", path, path, rollout={"engine": "sglang"}),
            main=dist.get_rank() == 0,
            path=path,
            progress=SimpleNamespace(note=lambda _: None, stage=lambda _: nullcontext()),
            publish_weights=lambda: None,
            _stack=stack,
            _make_engine=lambda embedded: made("engine"),
        )
        own, module.RewardPool = module.RewardPool, Rewards
        try:
            module.Run._open_sampling(run)
        except Exception as error:
            return type(error).__name__, str(error)
        finally:
            module.RewardPool = own
    return "", ""


@pytest.mark.parametrize("part", ["engine", "rewards"])
def test_what_rank_zero_cannot_make_ends_the_run_everywhere(part: str, ranks: RankPool) -> None:
    assert ranks.run(2, opened, part, True) == [("UserError", "no server answers")] * 2
    own, other = ranks.run(2, opened, part, False)
    assert own == ("Unpicklable", "a lock is in it")
    assert other == ("RankError", "rank 0: Unpicklable: a lock is in it")


def begun(asked: bool) -> list[str]:
    """What rank 0's engine, which waits until the run is asked to stop, and the run are told."""
    import torch.distributed as dist

    from gtpo_megatron import control
    from gtpo_megatron.run import run as module

    main, said = dist.get_rank() == 0, []
    run = SimpleNamespace(
        samples=True,
        engine=SimpleNamespace(wait_started=lambda: said.append("wait")) if main else None,
        progress=SimpleNamespace(stage=lambda _: nullcontext()),
        signals=SimpleNamespace(agree=lambda: control.agree(asked and main) is not None),
        publish_weights=lambda: said.append("weights"),
    )
    module.Run._start_sampling(run)
    return said


def test_a_run_that_is_asked_to_stop_while_servers_start_gives_them_no_weights(ranks: RankPool) -> None:
    assert ranks.run(2, begun, False) == [["wait", "weights"], ["weights"]]
    assert ranks.run(2, begun, True) == [["wait"], []]
