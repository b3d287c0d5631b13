"""The export of one pipeline stage: its tensors, gathered over the ranks of the first replica that hold parts of them.

Megatron-Bridge's own export brings every tensor to every rank. Here the first rank of each stage (of its tensor, context
and data-parallel groups) gets the stage's tensors and no other; the ranks that it gathers from see one tensor at a time, and
all other ranks have nothing to do. No stage waits for another.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.exchange import assets
from gtpo_megatron.policy.exchange.export import check_names
from gtpo_megatron.policy.model import Policy, without_padding

with platform.importing_bridge():
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

_FROM_OTHER_STAGES = ("broadcast_from_pp_rank", "broadcast_obj_from_pp_rank")


def is_sender() -> bool:
    """Whether this rank is the one of its stage that gets the tensors."""
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return first_replica and parallel_state.get_tensor_model_parallel_rank() == 0


class StageExport:
    """This rank's part of the export of its stage. Making it is collective over the world."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        dense = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        experts = parallel_state.get_expert_data_parallel_rank() == 0  # experts have groups of their own
        # Bridge lists the parameters of other stages as well, without a module.
        self._tasks = [
            task
            for task in policy.bridge.get_conversion_tasks(policy.modules)
            if task is not None
            and task.megatron_module is not None
            and (experts if task.mapping.is_expert else dense)
        ]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) on the device of the weights, adapters merged.

        Collective over the ranks that the sender gathers from, for which it is the same; on all others it ends at once. A
        tensor may share the memory of the parameter that it comes from. With adapters, the stages say to each other at
        the start which they have.
        """
        if not self._tasks:
            return
        tensors = self._policy.bridge.export_hf_weights(
            self._policy.modules,
            cpu=False,
            show_progress=False,
            conversion_tasks=self._tasks,
            merge_adapter_weights=self._policy.peft is not None,
        )
        iterator = iter(tensors)
        while True:
            with _within_stage():
                named = next(iterator, None)
            if named is None:
                return
            name, tensor = named
            yield name, without_padding(self._policy, name, tensor).detach()

    def described(self) -> list[tuple[str, Tensor]]:
        """What `stream` brings, in its order, with tensors on the meta device. Collective as `stream` is.

        It goes through the whole export, a tensor at a time: what Bridge makes of a parameter, only Bridge knows.
        """
        return [(name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for name, t in self.stream()]


def check_stages(policy: Policy, source: str | Path, stages: Iterable[list[tuple[str, Tensor]]]) -> None:
    """See that the stages together export every weight of the policy's source, each once.

    Raises:
        UserError: names weights that are missing, unknown, or exported by two stages.
    """
    names = [name for stage in stages for name, _ in stage]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{source}: {len(twice)} weights are exported twice: {', '.join(twice[:3])}")
    check_names(set(names), assets.weight_map(policy), source)


@contextmanager
def _within_stage() -> Iterator[None]:
    """Bridge's mappings take what a stage holds as it is, where they would broadcast it to all stages."""
    kept = {name: getattr(MegatronParamMapping, name) for name in _FROM_OTHER_STAGES}
    for name in kept:
        setattr(MegatronParamMapping, name, _as_it_is)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(MegatronParamMapping, name, method)


def _as_it_is(mapping: Any, value: Any, cache_key: str | None = None) -> Any:
    return value
