"""Adam on the host: Megatron's own offload, run here with a CPU as GPU and host; nothing of it is replaced but what says "GPU".

What a GPU alone can show is not shown: that the copies are made on streams of their own, and that memory is freed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.pool import RankPool
from tests.policy import training
from tests.policy.test_checkpoint import load_and_go_on, save_and_go_on

Weights = dict[str, np.ndarray]


def config_of(directory: Path, checkpoint: Path, offload: bool, parallel: dict[str, Any]) -> Any:
    return training.run_config(
        directory,
        checkpoint,
        parallel=parallel,
        model={"dtype": "bf16"},
        optimizer={"distributed": True, "offload": offload, "weight_decay": 0.1},
    )


def three_steps(config: Any) -> tuple[list[tuple[float, ...]], Weights]:
    policy, optimizer, _ = training.start(config)
    for group in optimizer.megatron.param_groups:
        group["fused"] = True  # torch's kernel of the offloaded Adam, for both
    return training.steps(config, policy, optimizer, range(3)), training.weights(policy)


def places(config: Any) -> tuple[int, int, int]:
    """Optimizers inside after a step, those of parameters that share memory with the model's, and of loaded tensors kept whole."""
    from gtpo_megatron.policy.checkpoint.state import _adams

    policy, optimizer, checkpointer = training.start(config)
    checkpointer.load_latest()
    adams = _adams(optimizer)
    of_model = {
        buffer.param_data.untyped_storage().data_ptr() for chunk in policy.chunks for buffer in chunk.buffers
    }
    own = [p for adam in adams for group in adam.param_groups for p in group["params"]]
    held = [t for adam in adams for state in adam.state.values() for t in state.values()]
    return (
        len(adams),
        sum(p.untyped_storage().data_ptr() in of_model for p in own),
        sum(t.untyped_storage().nbytes() > t.nbytes for t in held),
    )


@pytest.mark.local_layers("Transformer Engine's Adam rounds otherwise than torch's on the host")
@training.DENSE_AND_EXPERTS
def test_an_update_on_the_host_is_that_on_the_gpu(
    ranks: RankPool,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    world: int,
    parallel: dict[str, int],
) -> None:
    def run(offload: bool) -> tuple[list[tuple[float, ...]], Weights]:
        return ranks.run(world, three_steps, config_of(tmp_path, tiny_checkpoint(family), offload, parallel))[
            0
        ]

    (metrics, weights), (expected_metrics, expected) = run(True), run(False)
    assert metrics == expected_metrics
    for name in expected:
        np.testing.assert_array_equal(weights[name], expected[name], err_msg=name)


def test_a_resumed_run_is_the_uninterrupted_one_and_may_leave_the_host(
    ranks: RankPool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_checkpoint("llama"), True, {})
    metrics, weights, _ = ranks.run(2, save_and_go_on, config)[0]
    resumed, resumed_weights, _, state = ranks.run(2, load_and_go_on, config)[0]
    assert state == training.state(2)
    assert resumed == metrics
    for name in weights:
        np.testing.assert_array_equal(resumed_weights[name], weights[name], err_msg=name)
    for count, shared, whole in ranks.run(2, places, config):
        assert count > 10 and shared == 0 and whole == 0

    on_gpu = config_of(tmp_path, tiny_checkpoint("llama"), False, {})
    elsewhere, _, _, _ = ranks.run(1, load_and_go_on, on_gpu)[0]
    np.testing.assert_allclose(
        elsewhere, metrics, rtol=1e-3
    )  # the kernels of torch's AdamW round differently


def test_a_checkpoint_of_an_optimizer_on_the_gpu_is_resumed_on_the_host(
    ranks: RankPool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    metrics, _, _ = ranks.run(2, save_and_go_on, config_of(tmp_path, tiny_checkpoint("llama"), False, {}))[0]
    resumed, _, _, _ = ranks.run(2, load_and_go_on, config_of(tmp_path, tiny_checkpoint("llama"), True, {}))[
        0
    ]
    np.testing.assert_allclose(resumed, metrics, rtol=1e-3)
