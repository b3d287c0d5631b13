"""Whole training runs with SGLang rollouts, for the rank pool."""

import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gtpo_megatron import train as loop
from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.rollout.sglang.weights import outlets, transfer
from gtpo_megatron.run import rounds
from gtpo_megatron.run.run import Run
from gtpo_megatron.run.turns import Turn, Turns
from gtpo_megatron.trajectories.record import Trajectory

OVERLAP_S = 120.0


def run_config(directory: Path, checkpoint: Path, steps: int, **sections: Any) -> RunConfig:
    """GTPO on sums with a reward that a random policy has a signal from; sections are given as dictionaries."""
    data = directory / "sums.jsonl"
    data.write_text("".join(f'{{"question": "{a} + 5 =", "answer": "{a + 5}"}}\n' for a in range(20)))
    base = {
        "name": "run",
        "dir": str(directory),
        "model": {"path": str(checkpoint), "dtype": "fp32"},
        "data": {"path": str(data), "system_prompt": "", "max_prompt_tokens": 64},
        "training": {"steps": steps, "micro_batch_tokens": 256},
        "rollout": {"engine": "sglang", "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 12},
        "rewards": {
            "workers": 1,
            "terms": [{"kind": "python", "function": "tests.chaos_reward:different_characters"}],
        },
        "optimizer": {"lr": 1e-2},
        "logging": {"tensorboard": False, "progress": "off"},
    }
    return RunConfig.model_validate(base | {k: {**base.get(k, {}), **value} for k, value in sections.items()})


def train(config: RunConfig) -> int | str:
    """The exit code of the run, or the message of the error that ended it."""
    try:
        return loop.train(config)
    except UserError as error:
        return str(error)


def train_with_a_transfer_that_garbles(config: RunConfig, update: int, rounding: bool = False) -> int | str:
    """As `train`; in the update of this number the end of every bucket arrives as zeros, or, as `rounding`, one bit off."""
    begun = [0]
    begin, send = transfer.Transfer._begin, outlets.Broadcast.send

    async def count(self: transfer.Transfer) -> None:
        begun[0] += 1
        await begin(self)

    def garble(self: outlets.Broadcast, flat: torch.Tensor) -> None:
        if begun[0] == update:
            flat = flat.clone()
            if rounding:
                flat[-4] ^= 1  # of the last fp32 number
            else:
                flat[-len(flat) // 8 :] = 0
        send(self, flat)

    with patch.object(transfer.Transfer, "_begin", count), patch.object(outlets.Broadcast, "send", garble):
        return train(config)


def train_beside_rollout(config: RunConfig) -> int:
    """Train, but begin no update before the next batch has been sampled: with rollouts in turn this would never end."""
    sampled = {step: threading.Event() for step in range(1, config.training.steps)}
    sample_share, train_on = rounds.sample_share, loop.train_on

    def told(*arguments: Any) -> list[Trajectory]:
        share = sample_share(*arguments)
        step = share[0].step
        if step in sampled:
            sampled[step].set()
        return share

    def patient(run: Run, *batch: Any) -> Any:
        if run.step + 1 in sampled and not sampled[run.step + 1].wait(OVERLAP_S):
            raise AssertionError(
                f"batch {run.step + 1} was not sampled while batch {run.step} was trained on"
            )
        return train_on(run, *batch)

    with patch.object(rounds, "sample_share", told), patch.object(loop, "train_on", patient):
        return loop.train(config)


def train_with_a_server_that_dies_asleep(config: RunConfig, step: int) -> int | str:
    """As `train`; its server is killed while this step is trained on, when its memory is the trainer's."""
    train_on = loop.train_on

    def kill_first(run: Run, *batch: Any) -> Any:
        if run.step == step:
            worker = run.engine._pool.fleet.workers[0]
            assert not worker.holds
            worker.process.end()
        return train_on(run, *batch)

    with patch.object(loop, "train_on", kill_first):
        return train(config)


def train_stopped_in(config: RunConfig, turn: Turn, count: int, rank: int) -> int | str:
    """As `train`; a signal reaches one rank when it goes over to this turn for the `count`-th time (`weights` and
    `sampling`: the first is part of the start, before signals are seen to)."""
    take, begun = Turns.take, [0]

    def stopped(self: Turns, to: Turn) -> None:
        begun[0] += to == turn
        if (to, begun[0], world_rank()) == (turn, count, rank):
            os.kill(os.getpid(), signal.SIGUSR1)
        take(self, to)

    with patch.object(Turns, "take", stopped):
        return train(config)
