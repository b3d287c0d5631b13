"""How the policy's weights get from the trainer's ranks to its engine: whole, or each pipeline stage sends its own."""

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

from gtpo_megatron import control, network
from gtpo_megatron.policy.collective import for_rank_zero, together
from gtpo_megatron.policy.exchange.stage import StageExport, check_stages, is_sender
from gtpo_megatron.policy.model import Policy, export_hf_weights, world_rank
from gtpo_megatron.rollout.protocol import NamedTensor, RolloutEngine
from gtpo_megatron.rollout.sglang.weights.buckets import lay_out
from gtpo_megatron.rollout.sglang.weights.outlets import COLLECTIVE_S
from gtpo_megatron.rollout.sglang.weights.stages import StageSender
from gtpo_megatron.run.costs import Flow

if TYPE_CHECKING:  # its imports are for rank 0
    from gtpo_megatron.rollout.sglang.engine import SGLangEngine


def with_whole_export(
    policy: Policy,
    engine: RolloutEngine | None,
    action: Callable[[Iterator[NamedTensor]], None],
) -> None:
    """Run `action` with the exported weights where there is an engine; an error of it is raised on all ranks."""
    weights = export_hf_weights(policy)

    def act() -> None:
        try:
            if engine is not None:
                action(weights)
        finally:
            for _ in weights:
                pass  # every rank takes part in the whole export

    together(act)


class StageWeights:
    """The senders of all stages, seen from one rank. Use as a context; all of it is collective over the world.

    Rank 0 is the sender of the first stage and drives `engine`; the sender of every other stage answers it in a thread.
    What the stages export is agreed on here, once, before anything is sent. `source` names the policy's checkpoint.

    Raises:
        UserError: a weight is exported by no stage or by two.
    """

    def __init__(self, policy: Policy, source: str, bucket_bytes: int, engine: "SGLangEngine | None") -> None:
        self._engine = engine
        self._bytes = 0  # of all stages; on rank 0
        self.export = StageExport(policy)
        self._sender: StageSender | None = None
        described = together(self.export.described)
        self.layouts = layouts = lay_out(described, bucket_bytes)
        together(self._start)
        offer = (self._sender.address, layouts) if self._sender is not None else None
        names = control.gather_to_zero(described if is_sender() else [])
        offers = control.gather_to_zero(offer)

        def follow() -> None:
            check_stages(policy, source, names)
            self._bytes = sum(tensor.nbytes for stage in names for _, tensor in stage)
            engine.follow_stages(layouts, [offer for offer in offers if offer is not None])

        for_rank_zero(follow)

    def _start(self) -> None:
        if is_sender() and world_rank() != 0:
            master = os.environ.get("MASTER_ADDR", "127.0.0.1")
            limits = COLLECTIVE_S, control.STEP_LIMIT.total_seconds()
            self._sender = StageSender(world_rank(), network.own_address(master), self.layouts, *limits)

    def publish(self, version: int) -> Flow:
        """Give the servers this version. They are to be ready for it, and no batch in the way, on all ranks.

        Returns the bytes of all stages and the seconds; on rank 0. Raises on every rank what failed on one.
        """
        started = time.perf_counter()
        together(lambda: self._send(version))
        return Flow(self._bytes, time.perf_counter() - started)

    def _send(self, version: int) -> None:
        weights = self.export.stream()
        try:
            if self._engine is not None:
                self._engine.update_weights(weights, version)
            elif self._sender is not None:
                self._sender.update(weights)
        finally:
            for _ in weights:
                pass  # the ranks that hold parts of the stage's tensors are in the export together

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sender is not None:
            self._sender.close()
