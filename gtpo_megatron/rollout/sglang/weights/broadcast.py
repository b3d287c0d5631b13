"""The process group over which weights leave the trainer for servers."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from gtpo_megatron.network import gloo_towards, is_loopback, own_address


@dataclass(frozen=True)
class Target:
    """A server to be updated: its URL, its number of ranks, and where they are."""

    url: str
    ranks: int
    first_gpu: int | None = None  # of as many as it has ranks, where that is known


class Broadcast:
    """A process group of the trainer's process (rank 0) and all ranks of some servers.

    Made of a store and a backend of its own, so that the trainer's default group neither needs to exist nor sees it.
    The key prefixes are those of torch's helper, through which the servers join.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device, timeout_s: float) -> None:
        self.targets = tuple(targets)
        self.name = f"weights-{uuid.uuid4().hex[:8]}"
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.world_size = 1 + sum(target.ranks for target in targets)
        self.device = device
        self._timeout = timedelta(seconds=timeout_s)
        self.host = _own_address(targets)
        self._store = TCPStore(
            self.host, 0, self.world_size, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self.port = self._store.port
        self._group: Any = None

    def join(self) -> None:
        """Rank 0's part of the rendezvous; blocks until the servers have joined."""
        store: Store = PrefixStore(f"{self.name}/", PrefixStore(self.name, self._store))
        if self.backend == "nccl":
            from torch.distributed import ProcessGroupNCCL  # torch without CUDA lacks the name

            torch.cuda.set_device(self.device)
            options = ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group = ProcessGroupNCCL(PrefixStore("cuda/", store), 0, self.world_size, options)
        else:
            with gloo_towards(self.host):
                self._group = ProcessGroupGloo(
                    PrefixStore("cpu/", store), 0, self.world_size, timeout=self._timeout
                )

    def send(self, flat: torch.Tensor) -> None:
        """Broadcast one tensor; returns when it has left (gloo) or has been enqueued and finished (NCCL)."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        # Destroying a gloo group waits for its collectives: if `close` comes meanwhile, that must happen in this thread.
        group = self._group
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)
        group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def close(self) -> None:
        """Leave the group. A broadcast that hangs in another thread ends at its timeout (gloo) or at once (NCCL)."""
        if self._group is not None and hasattr(self._group, "abort"):
            self._group.abort()
        self._group = None
        del self._store


def _own_address(targets: Sequence[Target]) -> str:
    """The address of this machine by which the servers reach it. Raises UserError where there is no way to the first."""
    remote = [host for t in targets if not is_loopback(host := urlsplit(t.url).hostname or "")]
    if not remote:
        return "127.0.0.1"
    return own_address(remote[0])
