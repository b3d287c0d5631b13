"""As much of a run as its batches need, with an engine and rewards that cost nothing."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gtpo_megatron.data.prompts import Prompt
from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.errors import UserError
from gtpo_megatron.rewards.pool import Score
from gtpo_megatron.rollout.protocol import Completion, Group, PromptRequest, SamplingParams
from gtpo_megatron.trajectories.store import TrajectoryStore
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
        self.groups: list[int] = []  # numbers that it was given
        self.aborted = 0

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        self.calls += 1
        self.groups += [request.group for request in requests]
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
        self.aborted += 1


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


@contextmanager
def said() -> Iterator[list[str]]:
    """What the rooms of a run log meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("gtpo_megatron.run")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def in_order(directory: Path, staleness: int) -> list[list[str]]:
    from gtpo_megatron.run.batches import Batches

    run = light_run(directory, Engine(ahead=staleness), staleness=staleness)
    taken = []
    with Batches(run) as batches:
        for run.step in range(6):
            taken.append(ids_of(batches.next()))
    assert run.store.steps() == list(range(6))
    return taken
