"""Batches of analysed trajectories, one a step: sampled now, sampled ahead, or read back after a restart.

A step's batch is stored, with the position of the prompt sampler behind it, before it is trained on. So a run that goes on
from a checkpoint uses the batches that are stored already, and no prompt is lost or taken twice: prompts are taken for
one batch after the other, with its replacements, however far ahead it is sampled.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

from gtpo_megatron import control
from gtpo_megatron.policy.collective import for_rank_zero, on_rank_zero
from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.rollout.collect import GroupPrompt, analyse, gather, solutions
from gtpo_megatron.run.costs import Flow
from gtpo_megatron.run.queue import Job
from gtpo_megatron.run.rounds import Rounds, Share
from gtpo_megatron.run.run import Run
from gtpo_megatron.run.signals import Interrupted
from gtpo_megatron.trajectories.record import Trajectory

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """A batch before its analysis; its trajectories are on rank 0 alone."""

    trajectories: list[Trajectory]
    behind: dict[str, Any]  # the prompt sampler's state behind it
    stored: bool = False  # and to be read back


class Batches:
    """The batches of a run in order. Use as a context; building it, `next` and `settle` are collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rollout = run.config.rollout
        self._ahead: dict[int, Callable[[], Sampled]] = {}  # batches that were begun, by step
        self._behind = run.sampler.state_dict()  # behind the last batch that is stored
        self._failure: Exception | None = None  # of a batch made ahead: none behind it can be made
        shared = control.broadcast_from_zero(run.engine is None or run.engine.on_every_rank)
        if shared and self._rollout.staleness > 1:
            raise ValueError("an engine on every rank samples one batch ahead at most")
        # Rank 0's engine makes whole batches ahead. Where every rank has one, rounds are judged together, which cannot go on
        # beside training: the first round alone is sampled ahead.
        self._begin = self._begin_together if shared else self._begin_alone
        self._rounds = (
            Rounds(run, self._gather, control.broadcast_from_zero)
            if shared
            else Rounds(run, lambda share: share(), lambda value: value)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead and self._run.engine is not None:
            self._run.engine.abort_all(for_good=True)
        self._thread.shutdown(cancel_futures=True)

    def next(self) -> list[Trajectory]:
        """The batch of the run's current step, on rank 0; nothing elsewhere.

        As many later ones as `rollout.staleness` allows are started. Raises Interrupted, on every rank, if the run is
        asked to stop before the batch is whole: what there is of it is dropped, and its prompts stay the next ones.
        """
        run, step = self._run, self._run.step
        if run.config.algorithm.name == "sft":
            prompts = run.next_prompts(run.config.training.sft_batch_size, step)
            self._behind = run.sampler.state_dict()
            return for_rank_zero(lambda: solutions(prompts, run.tokenizer, step)) or []
        with run.stage("rollout"):
            batch = self._finish(step)
        for later in range(step + 1, min(step + 1 + self._rollout.staleness, run.config.training.steps)):
            if later not in self._ahead:
                self._ahead[later] = self._begin(later, ahead=True)
        return batch

    def settle(self) -> None:
        """Store the batches that are being sampled ahead, so that a checkpoint taken now loses none.

        A run that is asked to stop waits for none: those that are not whole are dropped, and their prompts stay the next ones.
        """
        try:
            for step in sorted(self._ahead):
                self._finish(step)
        except Interrupted as cut:
            log.info("%s", cut)

    def sampled(self, step: int) -> Flow | None:
        """Generated tokens of the step's batch that this rank's engine sampled and had scored; None if it was read back."""
        return self._rounds.sampled.pop(step, None)

    @property
    def sampler_state(self) -> dict[str, Any]:
        """Where a resumed run has to go on with prompts: with those of the batches that are not stored."""
        return self._behind

    def _finish(self, step: int) -> list[Trajectory]:
        """The step's batch: begun ahead or sampled now, or read back; analysed and stored. On rank 0; nothing elsewhere."""
        begun = self._ahead.pop(step, None) or self._begin(step, ahead=False)
        made = begun()

        def analysed() -> list[Trajectory]:
            if made.stored:
                return self._run.store.read(step)
            batch = analyse(made.trajectories, self._run.config.algorithm.advantages)
            with self._run.stage("store"):
                self._run.store.write(step, batch, {"sampler": made.behind})
            return batch

        batch = for_rank_zero(analysed) or []
        self._behind = made.behind
        return batch

    # ------------------------------------------------------------------ an engine on every rank

    def _begin_together(self, step: int, *, ahead: bool) -> Callable[[], Sampled]:
        """Begin a batch on every rank: its first round, beside training if it is `ahead`. Returns what finishes it; collective."""
        run = self._run
        if on_rank_zero(lambda: run.store.path(step).exists()):
            behind = on_rank_zero(lambda: run.store.read_notes(step)["sampler"])
            run.sampler.load_state_dict(behind)
            return lambda: Sampled([], behind, stored=True)
        prompts = self._rounds.prompts(step)
        # at once, so that a batch ahead always comes before the update that follows it: a seed fixes its weights
        place = run.queue.enter(Job.BATCH, step)
        first = partial(self._rounds.first, step, prompts, place)
        if ahead:
            future = self._thread.submit(first)
            future.add_done_callback(lambda _: run.queue.leave(place))  # if it never began
            first = future.result
        return lambda: self._whole_together(step, prompts, first)

    def _whole_together(self, step: int, prompts: Sequence[GroupPrompt], first: Share) -> Sampled:
        whole = self._rounds.rest(step, prompts, self._gather(first))
        return Sampled(whole, self._run.sampler.state_dict())

    def _gather(self, share: Share) -> list[Trajectory]:
        """All ranks' shares of a round on rank 0. Collective; if one was interrupted, all are."""
        return gather(self._outcome(share))

    # ------------------------------------------------------------------ an engine of rank 0's

    def _begin_alone(self, step: int, *, ahead: bool) -> Callable[[], Sampled]:
        """Begin a batch on rank 0, all of it beside training if it is `ahead`. Returns what finishes it; collective."""
        make = partial(self._whole_alone, step)
        if world_rank():
            make = partial(Sampled, [], {})
        elif ahead:
            make = self._thread.submit(make).result

        def finish() -> Sampled:
            made = self._outcome(make)
            control.raise_together(made if isinstance(made, Exception) else None)
            return replace(made, behind=control.broadcast_from_zero(made.behind))

        return finish

    def _whole_alone(self, step: int) -> Sampled:
        """Rank 0's batch, after all before it, so that prompts are taken in order. No collectives: beside training."""
        run = self._run
        if self._failure is not None:
            raise self._failure
        try:
            if run.store.path(step).exists():
                behind = run.store.read_notes(step)["sampler"]
                run.sampler.load_state_dict(behind)
                return Sampled([], behind, stored=True)
            prompts = self._rounds.prompts(step)
            first = self._rounds.first(step, prompts, run.queue.enter(Job.BATCH, step))
            return Sampled(self._rounds.rest(step, prompts, first), run.sampler.state_dict())
        except Exception as error:
            self._failure = error
            raise

    def _outcome(self, action: Callable[[], T]) -> T | Exception:
        """What the action gives on this rank, or the error that ends it here. Collective; an interruption is raised on all."""
        try:
            own = action()
        except Exception as error:
            own = error
        cut_short = isinstance(own, Interrupted)
        if not self._run.signals.cut_short(cut_short):
            return own
        if isinstance(own, Exception) and not cut_short:
            log.warning("dropped with the batch that the stop cut short: %s", own)
        raise own if cut_short else Interrupted("sampling was cut short on another rank")
