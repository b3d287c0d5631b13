"""What a training pass sees of each completion and token, kept beside the loss for the record."""

from typing import Literal

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from gtpo_megatron import control
from gtpo_megatron.algorithm import completion_normalizers
from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.policy.batch import MicroBatch
from gtpo_megatron.policy.head import TokenStatistics
from gtpo_megatron.policy.objective import Objective, Report, entropy_weight
from gtpo_megatron.policy.step import PassResult
from gtpo_megatron.trajectories.seen import Seen
from gtpo_megatron.trajectories.shares import BatchTable


class TokenWatch:
    """Keeps the log-probabilities, and by option the entropies, of one pass's tokens.

    Args:
        level: `logging.seen`; "off" and "completions" keep nothing of tokens.
    """

    def __init__(self, level: Literal["off", "completions", "logprobs", "entropies"]) -> None:
        self._names = {"logprobs": ("logprobs",), "entropies": ("logprobs", "entropies")}.get(level, ())
        self._kept: list[tuple[MicroBatch, dict[str, Tensor]]] = []

    def on(self, objective: Objective) -> Objective:
        """The same objective, watched."""
        if not self._names:
            return objective

        def loss(batch: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, Report]:
            values = {"logprobs": statistics.logprobs.detach().float()}
            if "entropies" in self._names:
                values["entropies"] = statistics.entropy.detach().bfloat16()
            self._kept.append((batch, values))
            return objective.loss(batch, statistics)

        return Objective(loss, objective.entropy_floor)

    def gather(self, table: BatchTable) -> dict[str, list[NDArray[np.float32]]] | None:
        """float32 [L] of each completion, on rank 0; None elsewhere, and where nothing is kept. Collective.

        8 bytes a token go to rank 0, 10 with entropies.
        """
        if not self._names:
            return None
        starts = np.concatenate([[0], np.cumsum(table.rows["length"], dtype=np.int64)])
        speaks = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        gathered = control.gather_to_zero(self._own(starts) if speaks else None)
        if gathered is None:
            return None
        flat = {name: np.full(starts[-1], np.nan, np.float32) for name in self._names}
        for places, values in (part for part in gathered if part is not None):
            for name in self._names:
                flat[name][places] = _float32(values[name])
        return {name: np.split(values, starts[1:-1]) for name, values in flat.items()}

    def _own(self, starts: NDArray[np.int64]) -> tuple[NDArray, dict[str, NDArray]]:
        """Places of this rank's tokens in the whole batch, and their values; bfloat16 as its bits."""
        places, values = [], {name: [] for name in self._names}
        for batch, kept in self._kept:
            if batch.indices:
                begins = starts[np.array(batch.indices)][batch.completion.cpu().numpy()]
                places.append(begins + batch.offset.cpu().numpy())
                for name in self._names:
                    value = kept[name].cpu()
                    bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
                    values[name].append(bits.numpy())
        small = np.int32 if starts[-1] < 2**31 else np.int64
        return (
            np.concatenate([np.zeros(0, small), *places]).astype(small),
            {name: np.concatenate([np.zeros(0, _kind(name)), *parts]) for name, parts in values.items()},
        )


def _kind(name: str) -> type[np.generic]:
    return np.int16 if name == "entropies" else np.float32


def _float32(values: NDArray) -> NDArray[np.float32]:
    if values.dtype == np.int16:  # the bits of bfloat16 are the upper half of float32's
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


def coefficients(
    config: AlgorithmConfig,
    table: BatchTable,
    entropy: NDArray[np.float32],
    gate: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """What the objective, which is maximised, has before a completion's sum of weighted token ratios: [N].

    gate (A - gamma <H>) / (num_completions L) for GTPO; A / (num_completions L) for GRPO, whose clipping and KL term come after.
    """
    group, prefix, suffix = (torch.tensor(table.rows[name]).long() for name in ("group", "prefix", "suffix"))
    count = completion_normalizers(group, prefix, suffix, config.compat).numpy()
    signal = table.rows["advantage"].astype(np.float64)
    if config.name == "gtpo":
        signal = gate * (signal - entropy_weight(config) * entropy)
    return (signal / (count * table.rows["length"].astype(np.float64))).astype(np.float32)


def seen_of(config: AlgorithmConfig, table: BatchTable, passed: PassResult) -> Seen:
    """The record of a pass; on rank 0 with what was kept of the tokens."""
    values = passed.completions
    gate = values.get("gate")
    return Seen(
        entropy=values["entropy"],
        coefficient=coefficients(config, table, values["entropy"], gate),
        gap=values["gap"],
        gap_max=values["gap_max"],
        gate=gate,
        **(passed.tokens or {}),
    )
