"""How the policy's weights get from the trainer's ranks to its engine: whole, or each pipeline stage sends its own, or where they lie."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Self

from gtpo_megatron import control, network
from gtpo_megatron.config import RunConfig
from gtpo_megatron.policy.collective import for_rank_zero, together
from gtpo_megatron.policy.exchange.stage import StageExport, check_stages, is_sender
from gtpo_megatron.policy.model import Policy, export_hf_weights, world_rank
from gtpo_megatron.rollout.protocol import NamedTensor, RolloutEngine
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, SharedBucket, fill, lay_out
from gtpo_megatron.rollout.sglang.weights.outlets import COLLECTIVE_S
from gtpo_megatron.rollout.sglang.weights.pickled import gpu_handle
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


class SharedWeights:
    """Weights for servers on the ranks' own GPUs: every rank gathers them, and a server opens those on its GPUs.

    Bucket by bucket, so that no GPU holds a second whole copy: beyond the weights there are the bucket that is gathered, the
    one that servers read, and a tensor in the making. Without GPUs the buckets of rank 0 go to all servers as they are. All
    of it is collective over the world.
    """

    def __init__(self, policy: Policy, bucket_bytes: int, engine: "SGLangEngine | None") -> None:
        self._policy, self._engine = policy, engine
        described = together(lambda: [(name, tensor.to("meta")) for name, tensor in self._export()])
        self.layouts = lay_out(described, bucket_bytes)

    def publish(self, version: int) -> Flow:
        """Give the servers this version; bytes of the weights, and seconds. Raises on every rank what failed on one."""
        started = time.perf_counter()
        together(lambda: self._send(version))
        return Flow(sum(layout.nbytes for layout in self.layouts), time.perf_counter() - started)

    def _send(self, version: int) -> None:
        buckets = self._buckets()
        try:
            if self._engine is not None:
                self._engine.update_from_buckets(buckets, version)
        finally:
            for _ in buckets:
                pass  # all ranks make them together

    def _buckets(self) -> Iterator[SharedBucket]:
        """All ranks' buckets, with the handles of all on rank 0. Collective at every step.

        When a bucket is asked for, the last but one has been read: on all ranks it is given up then, and not before.
        """
        weights = self._export()
        stream = fill(self.layouts, weights)
        held: deque[Bucket] = deque()
        try:
            while True:
                control.agree(False)  # nobody goes on before rank 0 does, who knows what has been read
                if len(held) == 2:
                    held.popleft()
                bucket = together(lambda: next(stream, None))
                if bucket is None:
                    return
                held.append(bucket)
                handles = control.gather_to_zero(together(partial(gpu_handle, bucket))) or []
                yield SharedBucket(
                    bucket.names, bucket.dtypes, bucket.shapes, bucket.flat, dict(filter(None, handles))
                )
        finally:
            for _ in weights:
                pass

    def _export(self) -> Iterator[NamedTensor]:
        return export_hf_weights(self._policy, cpu=False)


Sender = StageWeights | SharedWeights


def make_sender(
    config: RunConfig, policy: Policy, engine: "SGLangEngine | None", stack: ExitStack
) -> Sender | None:
    """Who sends weights to servers, closed with `stack`; None where the whole export goes by rank 0. Collective."""
    rollout = config.rollout
    method, bucket = rollout.sglang.weight_transfer, rollout.sglang.bucket_mb << 20
    if method == "distributed":
        return stack.enter_context(StageWeights(policy, config.model.path, bucket, engine))
    if method == "tensor" and rollout.placement == "together":
        return SharedWeights(policy, bucket, engine)
    return None
