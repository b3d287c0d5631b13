"""Whole runs of `train`, as one rank of the pool does them."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError


def small_run(directory: Path, name: str, model: Path, prompts: Path, **sections: Any) -> RunConfig:
    """A run of a few short steps; sections are given as dictionaries and overlay the defaults."""
    defaults: dict[str, Any] = {
        "name": name,
        "dir": str(directory),
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"path": str(prompts), "system_prompt": "", "max_prompt_tokens": 120},
        "training": {"steps": 3, "micro_batch_tokens": 256, "sft_batch_size": 4},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
        # with a large epsilon the update is smooth in the gradient, as a comparison of layouts needs
        "optimizer": {"lr": 1e-2, "eps": 1e-2, "warmup_steps": 2},
        "rewards": {"terms": [reward("different_characters")], "workers": 1},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": "off"},
    }
    merged = {key: {**defaults.get(key, {}), **value} for key, value in sections.items()}
    return RunConfig.model_validate(defaults | merged)


def reward(function: str) -> dict[str, str]:
    """The term of one of the tests' rewards."""
    return {"kind": "python", "name": "characters", "function": f"tests.training_rewards:{function}"}


def run_training(config: RunConfig) -> int | str:
    """The exit code of the run, or the message of its UserError."""
    from gtpo_megatron.train import train

    try:
        return train(config)
    except UserError as error:
        return str(error)


def run_checked(config: RunConfig) -> int | str:
    """As `run_training`, after the checks that the command line makes of a run in one process."""
    from gtpo_megatron.plan.checks import check_run

    try:
        check_run(config, 1)
    except UserError as error:
        return str(error)
    return run_training(config)


def run_counting_policies(config: RunConfig) -> tuple[int | str, int]:
    """The exit code, and how many policies the run has built."""
    from gtpo_megatron.run import run as module

    with patch.object(module, "build_policy", wraps=module.build_policy) as built:
        return run_training(config), built.call_count


def run_noting_the_store(config: RunConfig) -> tuple[int | str, list[bool]]:
    """The exit code, and for each step whether its batch was stored when training on it began."""
    from gtpo_megatron import train as module

    train_on, stored = module.train_on, []

    def noting(run: Any, *batch: Any) -> Any:
        stored.append(run.store.path(run.step).exists())
        return train_on(run, *batch)

    module.train_on = noting
    try:
        return run_training(config), stored
    finally:
        module.train_on = train_on


def run_with_signal(config: RunConfig, rank: int, number: int = signal.SIGTERM) -> tuple[int | str, bool]:
    """The exit code of a run of which one rank gets a signal after its first step, and if handlers are as before."""
    import torch.distributed as dist

    before = signal.getsignal(number)
    metrics = config.path / "metrics.jsonl"

    def send() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if dist.get_rank() == rank:
        threading.Thread(target=send, daemon=True).start()
    return run_training(config), signal.getsignal(number) == before


def run_stopped_in_sampling(config: RunConfig, rank: int, call: int) -> int | str:
    """The exit code of a run of which one rank gets SIGTERM when its engine begins a batch for the `call`th time."""
    import torch.distributed as dist

    from gtpo_megatron.rollout.embedded import EmbeddedEngine

    generate, calls = EmbeddedEngine._generate, 0

    def signalled(engine: EmbeddedEngine, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
            assert engine._ended.wait(60)
        return generate(engine, *arguments)

    with patch.object(EmbeddedEngine, "_generate", signalled):
        return run_training(config)


def run_without_a_last_evaluation(config: RunConfig) -> int | str:
    """As `run_training`, but the evaluation after the last step fails with its last suite."""
    from gtpo_megatron import train as loop

    evaluate = loop.evaluate_prompts

    def fail_at_the_end(*arguments: Any) -> Any:
        if arguments[-1] == config.training.steps and arguments[0].evaluation.samples == 4:
            raise UserError("no server left")
        return evaluate(*arguments)

    with patch.object(loop, "evaluate_prompts", fail_at_the_end):
        return run_training(config)


def run_destroying_weights(config: RunConfig, step: int) -> int | str:
    """As `run_training`, but one parameter becomes NaN with the update of the step of this number, from 1."""
    import torch

    from gtpo_megatron import train as loop

    apply_update = loop.apply_update
    updates = 0

    def destroy(optimizer: Any, policy: Any, loss: float) -> Any:
        nonlocal updates
        updates += 1
        update = apply_update(optimizer, policy, loss)
        if updates == step:
            with torch.no_grad():
                next(iter(policy.chunks[0].parameters())).view(-1)[0] = float("nan")
        return update

    with patch.object(loop, "apply_update", destroy):
        return run_training(config)
