"""Bytes that the forward pass of a real model saves for its backward pass, by torch's hooks: no allocator has a say in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.policy import platform
from gtpo_megatron.trajectories.record import Trajectory

platform.install()

from gtpo_megatron.policy.model import build_policy, initialize_parallel, unwrap  # noqa: E402
from gtpo_megatron.policy.objective import Objective, Report  # noqa: E402
from gtpo_megatron.policy.step import forward_backward, pack  # noqa: E402


def saved_bytes(checkpoint: Path, parallel: ParallelConfig, recompute: str, tokens: int) -> dict[str, Any]:
    """What this rank's model (the head apart) saves for one micro-batch of one sequence of `tokens`, in fp32.

    Each storage counts once, and parameters not at all.
    """
    initialize_parallel(parallel, seed=0)
    training = TrainingConfig(steps=1, micro_batch_tokens=tokens, recompute=recompute)
    policy = build_policy(ModelConfig(path=str(checkpoint), dtype="fp32", layers="local"), parallel, training)
    model = unwrap(policy.chunks[0])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.setdefault(
                tensor.untyped_storage().data_ptr(), tensor
            )  # alive, so that no address is used again
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    model.register_forward_pre_hook(lambda *_: hooks.__enter__())
    model.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    half = tokens // 2
    sequence = Trajectory(
        step=0,
        group=0,
        index=0,
        prompt_id="0",
        prompt_ids=np.full(half, 5, np.int32),
        token_ids=np.full(tokens - half, 7, np.int32),
        logprobs=np.zeros(tokens - half, np.float32),
        token_versions=np.zeros(tokens - half, np.int32),
        finish_reason="stop",
    )
    objective = Objective(lambda _, statistics: (-statistics.logprobs.sum(), Report()))
    forward_backward(policy, pack(policy, [sequence], parallel, tokens), objective, 1)
    sizes = Counter(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return {"bytes": sum(size * count for size, count in sizes.items()), "sizes": dict(sizes)}
