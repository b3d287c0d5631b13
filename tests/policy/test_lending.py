"""Memory lent to servers and taken back: exact, and readable meanwhile. That a GPU has it then, tests/gpu shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel.pool import RankPool
from tests.policy import training

Weights = dict[str, np.ndarray]


def config_of(directory: Path, checkpoint: Path, dtype: str, optimizer: dict[str, Any], **more: Any) -> Any:
    settings = {"weight_decay": 0.1, **optimizer}
    return training.run_config(directory, checkpoint, model={"dtype": dtype}, optimizer=settings, **more)


def started(config: Any) -> tuple[Any, ...]:
    from gtpo_megatron.policy.lending import Lender

    policy, optimizer, checkpointer = training.start(config)
    return policy, optimizer, checkpointer, Lender(policy, optimizer, state=not config.optimizer.offload)


def three_steps(config: Any, lending: bool) -> tuple[list[tuple[float, ...]], Weights]:
    policy, optimizer, _, lender = started(config)
    done = []
    for number in range(3):
        if lending:
            lender.lend()
            lender.take_back()
        done += training.steps(config, policy, optimizer, [number])
    return done, training.weights(policy)


def what_is_lent(config: Any) -> None:
    """Lend after a step: gradients are gone, the state lies elsewhere with its values, and comes back so."""
    from gtpo_megatron.policy.memory import own_tensors

    policy, optimizer, _, lender = started(config)
    training.steps(config, policy, optimizer, [0])
    own = own_tensors(optimizer, [policy])
    places, values = [t.data_ptr() for t in own], [t.detach().clone() for t in own]
    weights = training.weights(policy)
    buffers = [b for chunk in policy.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    sizes = [b.grad_data.untyped_storage().nbytes() for b in buffers]
    assert min(sizes) > 0 and len(own) > 10

    for _ in range(2):  # twice is once
        lender.lend()
    assert [b.grad_data.untyped_storage().nbytes() for b in buffers] == [0] * len(buffers)
    assert own_tensors(optimizer, [policy]) == own  # the same objects
    assert not {t.data_ptr() for t in own} & set(places)
    for _ in range(2):
        assert all(torch.equal(t, value) for t, value in zip(own, values, strict=True))
        lender.take_back()
    assert [b.grad_data.untyped_storage().nbytes() for b in buffers] == sizes
    assert all(not b.grad_data.any() for b in buffers)
    for name, weight in training.weights(policy).items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)


def saved_while_lent(config: Any, also: Any, trained: bool) -> None:
    """A checkpoint that is written while memory is lent, and, for another run, one of the same state while it is not."""
    policy, optimizer, checkpointer, lender = started(config)
    training.steps(config, policy, optimizer, range(2 * trained))
    lender.lend()
    checkpointer.save(training.state(2))
    checkpointer.finish()
    lender.take_back()
    checkpointer = training.checkpointer(also, policy, optimizer)
    checkpointer.save(training.state(2))
    checkpointer.finish()
    training.steps(config, policy, optimizer, [2])  # goes on


def from_checkpoint(config: Any) -> tuple[list[tuple[float, ...]], Weights]:
    policy, optimizer, checkpointer = training.start(config)
    assert checkpointer.load_latest() == training.state(2)
    return training.steps(config, policy, optimizer, range(2, 4)), training.weights(policy)


OPTIMIZERS = pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("fp32", {"distributed": False}),
        ("fp32", {"distributed": True}),
        ("bf16", {"distributed": False}),
        ("bf16", {"distributed": True}),
        ("bf16", {"distributed": True, "offload": True}),
    ],
    ids=["fp32", "fp32-distributed", "bf16", "bf16-distributed", "bf16-offload"],
)


@OPTIMIZERS
def test_steps_between_which_memory_is_lent_are_those_of_a_trainer_that_keeps_it(
    ranks: RankPool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, dtype: str, optimizer: dict
) -> None:
    config = config_of(tmp_path, tiny_checkpoint("qwen2_tied"), dtype, optimizer)
    metrics, weights = ranks.run(2, three_steps, config, True)[0]
    expected_metrics, expected = ranks.run(2, three_steps, config, False)[0]
    assert metrics == expected_metrics
    for name in expected:
        np.testing.assert_array_equal(weights[name], expected[name], err_msg=name)


@training.DENSE_AND_EXPERTS
def test_what_is_lent_lies_elsewhere_with_its_values_and_comes_back(
    ranks: RankPool,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    world: int,
    parallel: dict[str, int],
) -> None:
    config = config_of(tmp_path, tiny_checkpoint(family), "bf16", {"distributed": True}, parallel=parallel)
    ranks.run(world, what_is_lent, config)


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])
@pytest.mark.parametrize("trained", [False, True], ids=["before-the-first-step", "after-two"])
def test_a_checkpoint_may_be_written_while_memory_is_lent(
    ranks: RankPool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, distributed: bool, trained: bool
) -> None:
    config = config_of(tmp_path, tiny_checkpoint("llama"), "bf16", {"distributed": distributed})
    also = config.model_copy(update={"name": "also"})
    ranks.run(2, saved_while_lent, config, also, trained)
    while_lent, weights = ranks.run(2, from_checkpoint, config)[0]
    expected_metrics, expected = ranks.run(2, from_checkpoint, also)[0]
    assert while_lent == expected_metrics
    for name in expected:
        np.testing.assert_array_equal(weights[name], expected[name], err_msg=name)
