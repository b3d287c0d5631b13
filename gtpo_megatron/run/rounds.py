"""The rounds of which a batch is made: its prompts, and new ones in the place of groups without signal."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.rollout.collect import GroupPrompt, sample_share, without_signal
from gtpo_megatron.run.costs import Flow
from gtpo_megatron.run.queue import Job, Place
from gtpo_megatron.run.run import Run
from gtpo_megatron.run.signals import Interrupted
from gtpo_megatron.trajectories.record import Trajectory

T = TypeVar("T")
log = logging.getLogger(__name__)
Share = Callable[[], list[Trajectory]]  # samples this rank's part of a round


class Rounds:
    """Samples the rounds of one batch after another: prompts are taken in the order of the batches, and of their rounds.

    Args:
        collect: a round's trajectories of all ranks that sample, where they are judged; told this rank's share.
        told: the value of the rank that judges, on every rank that samples.
    """

    def __init__(
        self, run: Run, collect: Callable[[Share], list[Trajectory]], told: Callable[[T], T]
    ) -> None:
        self._run, self._rollout = run, run.config.rollout
        self._collect, self._told = collect, told
        self.sampled: dict[int, Flow] = {}  # generated tokens of this rank's engine, by step

    def prompts(self, step: int) -> list[GroupPrompt]:
        """Take the prompts of a batch's first round."""
        count = math.ceil(self._rollout.prompts_per_step * self._rollout.oversample)
        return self._run.next_prompts(count, step, 0)

    def first(self, step: int, prompts: Sequence[GroupPrompt], place: Place) -> list[Trajectory]:
        """This rank's part of the first round. No collectives: it may run beside training."""
        keep = self._rollout.prompts_per_step if self._rollout.oversample > 1 else None
        return self._share(step, prompts, keep, place)

    def rest(self, step: int, prompts: Sequence[GroupPrompt], sampled: list[Trajectory]) -> list[Trajectory]:
        """What makes a batch of its first round: unfinished prompts are put back, groups without signal replaced."""
        self._put_back(step, prompts, sampled)
        if self._rollout.dynamic_sampling.enabled:
            sampled = self._replace_without_signal(step, sampled)
        return _renumbered(sampled)

    def _share(
        self, step: int, prompts: Sequence[GroupPrompt], keep: int | None, place: Place
    ) -> list[Trajectory]:
        run = self._run
        own = prompts[world_rank() :: dist.get_world_size()] if run.engine.on_every_rank else prompts
        turn = run.queue.turn(place)
        share = sample_share(
            run.engine, run.rewards, run.tokenizer, own, run.sampling_params, step, keep, turn
        )
        tokens = sum(t.length for t in share)
        self.sampled.setdefault(step, Flow()).add(tokens, time.perf_counter() - place.since)
        whole = len(own) if keep is None else min(keep, len(own))
        if run.signals.asked and len({t.group for t in share}) < whole:
            raise Interrupted(f"step {step + 1}: sampling was cut short")
        return share

    def _put_back(self, step: int, prompts: Sequence[GroupPrompt], sampled: Sequence[Trajectory]) -> None:
        """Prompts whose groups oversampling left unfinished go first into the next round that takes prompts."""
        finished = self._told({t.group for t in sampled})
        left = [prompt.index for prompt in prompts if prompt.group not in finished]
        if left:
            log.info(
                "step %d: %d of %d groups were not finished; put back", step + 1, len(left), len(prompts)
            )
            self._run.sampler.put_back(left)

    def _replace_without_signal(self, step: int, sampled: list[Trajectory]) -> list[Trajectory]:
        """Sample new prompts in the place of groups whose rewards are all equal, for a number of rounds."""
        run = self._run
        unused = 1 + self._told(max((t.group for t in sampled), default=-1))
        for _ in range(self._rollout.dynamic_sampling.max_rounds):
            silent = self._told(sorted(without_signal(sampled)))
            if not silent:
                break
            prompts = run.next_prompts(len(silent), step, unused)
            unused += len(silent)
            place = run.queue.enter(Job.REPLACEMENT, step)
            fresh = self._collect(partial(self._share, step, prompts, None, place))
            useful = sorted({t.group for t in fresh} - without_signal(fresh))
            dropped = set(silent[: len(useful)])
            if world_rank() == 0:  # the others have no trajectories
                log.info(
                    "step %d: %d of %d groups without signal replaced", step + 1, len(useful), len(silent)
                )
            sampled = [t for t in sampled if t.group not in dropped] + [t for t in fresh if t.group in useful]
        return sampled


def _renumbered(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Groups numbered from 0 without gaps, in order."""
    places = {group: place for place, group in enumerate(sorted({t.group for t in trajectories}))}
    renumbered = [replace(t, group=places[t.group]) for t in trajectories]
    return sorted(renumbered, key=lambda t: (t.group, t.index))
