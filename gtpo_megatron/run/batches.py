"""Batches of analysed trajectories, one a step: sampled now, sampled ahead, or read back after a restart.

A step's batch is stored, with the position of the prompt sampler behind it, before it is trained on. So a run that goes on
from a checkpoint uses the batches that are stored already, and no prompt is lost or taken twice.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import torch.distributed as dist

from gtpo_megatron import control
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.collective import for_rank_zero, on_rank_zero
from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.rollout.collect import (
    GroupPrompt,
    analyse,
    gather,
    sample_share,
    solutions,
    without_signal,
)
from gtpo_megatron.run.costs import Flow
from gtpo_megatron.run.run import Run
from gtpo_megatron.run.signals import Interrupted
from gtpo_megatron.trajectories.record import Trajectory

log = logging.getLogger(__name__)


class Batches:
    """The batches of a run in order. Use as a context; `next` and `settle` are collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rollout = run.config.rollout
        # prompts of later steps' batches, and this rank's share of the trajectories
        self._ahead: dict[int, tuple[list[GroupPrompt], Future[list[Trajectory]]]] = {}
        # prompts taken for each batch that is not stored yet, by index, in the order in which they were taken
        self._taken: dict[int, list[int]] = {}
        self._behind = -1  # the last batch that the sampler is known to stand behind
        self._sampled: dict[int, Flow] = {}  # generated tokens of this rank's engine, by step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead and self._run.engine is not None:
            self._run.engine.abort_all()
        self._thread.shutdown(cancel_futures=True)

    def next(self) -> list[Trajectory]:
        """The batch of the run's current step, on rank 0; nothing elsewhere.

        As many later ones as `rollout.staleness` allows are started. Raises Interrupted, on every rank, if the run is
        asked to stop before the batch is whole: what there is of it is dropped, and its prompts stay the next ones.
        """
        run, step = self._run, self._run.step
        if run.config.algorithm.name == "sft":
            prompts = run.next_prompts(run.config.training.sft_batch_size, step)
            return for_rank_zero(lambda: solutions(prompts, run.tokenizer, step)) or []
        with run.stage("rollout"):
            batch = self._read(step) if self._is_stored(step) else self._finish(step)
        for later in range(step + 1, min(step + 1 + self._rollout.staleness, run.config.training.steps)):
            if self._is_stored(later):
                self._advance_sampler(later)
            elif later not in self._ahead:
                prompts = self._prompts(later)
                share = self._thread.submit(self._share, prompts, later, self._keep)
                self._ahead[later] = prompts, share
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
        return self._sampled.pop(step, None)

    @property
    def sampler_state(self) -> dict[str, Any]:
        """Where a resumed run has to go on with prompts: first with those of the batches that are not stored."""
        state = self._run.sampler.state_dict()
        unused = [index for step in sorted(self._taken) for index in self._taken[step]]
        return state | {"returned": unused + state["returned"]}

    def _is_stored(self, step: int) -> bool:
        return on_rank_zero(lambda: self._run.store.path(step).exists())

    def _read(self, step: int) -> list[Trajectory]:
        self._advance_sampler(step)
        return for_rank_zero(lambda: self._run.store.read(step)) or []

    def _advance_sampler(self, step: int) -> None:
        """Move the prompt sampler behind the prompts of a stored batch, if it is not further on already."""
        if step > self._behind:
            self._run.sampler.load_state_dict(
                on_rank_zero(lambda: self._run.store.read_notes(step)["sampler"])
            )
            self._behind = step

    @property
    def _keep(self) -> int | None:
        return self._rollout.prompts_per_step if self._rollout.oversample > 1 else None

    def _prompts(self, step: int) -> list[GroupPrompt]:
        count = math.ceil(self._rollout.prompts_per_step * self._rollout.oversample)
        return self._next_prompts(count, step)

    def _next_prompts(self, count: int, step: int, first_group: int = 0) -> list[GroupPrompt]:
        prompts = self._run.next_prompts(count, step, first_group)
        self._taken.setdefault(step, []).extend(prompt.index for prompt in prompts)
        return prompts

    def _share(self, prompts: Sequence[GroupPrompt], step: int, keep: int | None) -> list[Trajectory]:
        """This rank's part of the prompts, sampled and scored. No collectives: it may run beside training."""
        run = self._run
        if run.engine is None:
            return []
        own = prompts[world_rank() :: dist.get_world_size()] if run.engine.on_every_rank else prompts
        with run.engine_lock:  # one batch at a time
            started = time.perf_counter()
            share = sample_share(run.engine, run.rewards, run.tokenizer, own, run.sampling_params, step, keep)
        tokens = sum(t.length for t in share)
        self._sampled.setdefault(step, Flow()).add(tokens, time.perf_counter() - started)
        whole = len(own) if keep is None else min(keep, len(own))
        if run.signals.asked and len({t.group for t in share}) < whole:
            raise Interrupted(f"step {step + 1}: sampling was cut short")
        return share

    def _gather(self, share: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """All ranks' shares on rank 0. Collective; if one was interrupted, all are."""
        own = _outcome(share)
        cut_short = isinstance(own, Interrupted)
        if not self._run.signals.cut_short(cut_short):
            return gather(own)
        if isinstance(own, Exception) and not cut_short:
            log.warning("dropped with the batch that the stop cut short: %s", own)
        raise own if cut_short else Interrupted("sampling was cut short on another rank")

    def _finish(self, step: int) -> list[Trajectory]:
        """Sample the step's batch, or wait for it if it was started; replace groups, analyse, store."""
        run, config = self._run, self._run.config
        if step in self._ahead:
            prompts, share = self._ahead.pop(step)
            sampled = self._gather(share.result)
        else:
            prompts = self._prompts(step)
            sampled = self._gathered(prompts, step, self._keep)
        self._put_back(prompts, sampled, step)
        if config.rollout.dynamic_sampling.enabled:
            sampled = self._replace_without_signal(sampled, step)
        normalize = config.algorithm.advantages
        batch = for_rank_zero(lambda: analyse(_renumbered(sampled), normalize)) or []
        with run.stage("store"):
            used = self._taken.pop(step)
            notes = {"sampler": self.sampler_state}
            try:
                for_rank_zero(lambda: run.store.write(step, batch, notes))
            except UserError:
                self._taken[step] = used
                raise
        self._behind = max(self._behind, step)
        return batch

    def _put_back(self, prompts: Sequence[GroupPrompt], sampled: Sequence[Trajectory], step: int) -> None:
        """Prompts whose groups oversampling left unfinished go first into the next batch that takes prompts."""
        finished = on_rank_zero(lambda: {t.group for t in sampled})
        left = [prompt.index for prompt in prompts if prompt.group not in finished]
        if not left:
            return
        log.info("step %d: %d of %d groups were not finished; put back", step + 1, len(left), len(prompts))
        self._run.sampler.put_back(left)
        for index in left:
            self._taken[step].remove(index)

    def _gathered(self, prompts: Sequence[GroupPrompt], step: int, keep: int | None) -> list[Trajectory]:
        return self._gather(lambda: self._share(prompts, step, keep))

    def _replace_without_signal(self, sampled: list[Trajectory], step: int) -> list[Trajectory]:
        """Sample new prompts in the place of groups whose rewards are all equal, for a number of rounds."""
        unused = 1 + on_rank_zero(lambda: max(t.group for t in sampled))
        for _ in range(self._rollout.dynamic_sampling.max_rounds):
            silent = control.broadcast_from_zero(sorted(without_signal(sampled)))
            if not silent:
                break
            prompts = self._next_prompts(len(silent), step, first_group=unused)
            unused += len(silent)
            fresh = self._gathered(prompts, step, keep=None)
            useful = sorted({t.group for t in fresh} - without_signal(fresh))
            dropped = set(silent[: len(useful)])
            if world_rank() == 0:  # the others have no trajectories
                log.info(
                    "step %d: %d of %d groups without signal replaced", step + 1, len(useful), len(silent)
                )
            sampled = [t for t in sampled if t.group not in dropped] + [t for t in fresh if t.group in useful]
        return sampled


def _outcome(action: Callable[[], list[Trajectory]]) -> list[Trajectory] | Exception:
    """An error of one rank travels to all through `gather`, instead of leaving them in a collective."""
    try:
        return action()
    except Exception as error:
        return error


def _renumbered(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Groups numbered from 0 without gaps, in order."""
    places = {group: place for place, group in enumerate(sorted({t.group for t in trajectories}))}
    renumbered = [replace(t, group=places[t.group]) for t in trajectories]
    return sorted(renumbered, key=lambda t: (t.group, t.index))
