"""The export of one pipeline stage: its tensors, gathered over the ranks of the first replica that hold parts of them.

Megatron-Bridge's own export brings every tensor to every rank. Here the first rank of each stage (of its tensor, context
and data-parallel groups) gets the stage's tensors and no other; the ranks that it gathers from send it their parts and
hold none of another's, and all other ranks have nothing to do. No stage waits for another.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.exchange import assets
from gtpo_megatron.policy.exchange.export import check_names
from gtpo_megatron.policy.model import Policy, without_padding

with platform.importing_bridge():
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping


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

        Collective over the ranks that the sender gathers from; there tensors that are put together of parts are on the meta
        device. On all other ranks it ends at once. A tensor may share the memory of the parameter that it comes from. With
        adapters, the stages say to each other at the start which they have, and the ranks gathered from get the tensors too:
        merging needs them.
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
            with _within_stage(to_sender=self._policy.peft is None):
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
def _within_stage(*, to_sender: bool) -> Iterator[None]:
    """Bridge's mappings take what a stage holds as it is, where they would broadcast it to all stages.

    `to_sender`: they bring parts to the first rank of a group alone, where they would bring them to all.
    """
    methods: dict[str, Callable[..., Any]] = {
        "broadcast_from_pp_rank": _as_it_is,
        "broadcast_obj_from_pp_rank": _as_it_is,
    }
    if to_sender:
        methods |= {"gather_from_tp_ranks": _tensor_parts, "gather_from_ep_ranks": _experts}
    kept = {name: getattr(MegatronParamMapping, name) for name in methods}
    for name, method in methods.items():
        setattr(MegatronParamMapping, name, method)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(MegatronParamMapping, name, method)


def _as_it_is(mapping: Any, value: Any, cache_key: str | None = None) -> Any:
    return value


def _tensor_parts(mapping: Any, part: Tensor) -> list[Tensor]:
    """The parts of all tensor ranks, for `MegatronParamMapping.gather_from_tp_ranks`."""
    return _at_first(part, mapping.tp_group)


def _experts(mapping: Any, weight: Tensor, module: Any, name: str) -> dict[str, Tensor]:
    """The tensors of the experts that stand in the same place on each expert rank, by Hugging Face name, for
    `MegatronParamMapping.gather_from_ep_ranks`.
    """
    a_rank = mapping._get_config(module).num_moe_experts // mapping.ep_size
    place = int(re.search(r"experts\.(\d+)", name)[1]) % a_rank
    return {
        re.sub(r"experts\.\d+", f"experts.{place + rank * a_rank}", name): part
        for rank, part in enumerate(_at_first(weight, mapping.ep_group))
    }


def _at_first(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The parts [ranks of the group], all shaped alike, on the group's first rank; on the others as many on the meta device.

    What the caller puts together of them costs the others nothing. No copy of a part is made on the way, as the backends'
    own gather would make of all.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return [part]
    part = part.detach().contiguous()
    if dist.get_rank() == ranks[0]:
        parts = [part, *(torch.empty_like(part) for _ in ranks[1:])]
        calls = [dist.P2POp(dist.irecv, p, r, group) for p, r in zip(parts[1:], ranks[1:], strict=True)]
    else:
        parts = [torch.empty_like(part, device="meta")] * len(ranks)
        calls = [dist.P2POp(dist.isend, part, ranks[0], group)]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return parts
