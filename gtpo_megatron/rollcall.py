"""Who of a world still answers: when a collective breaks off, the rank that was lost is named, and not the one that noticed.

A rank that dies takes the connections of its neighbours with it, they take those of theirs, and every log ends with an
address that nobody knows. So a thread of each rank answers a call through the world's store, whatever its main thread waits
for. An answer stays: who answered the first call was alive when somebody first missed a peer, though it has ended since.
"""

import socket
import threading
import time

import torch.distributed as dist

from gtpo_megatron import control

POLL_S = 2.0  # between two looks for a call
PATIENCE_S = 3 * POLL_S  # for the answers
_answering: object = None  # the world in which this rank does


class PeerLost(RuntimeError):
    """A collective broke off because other ranks have ended, or cannot be reached."""


def answer_calls(poll_s: float = POLL_S) -> None:
    """From now on this rank answers, as long as there is this world. Call once, on every rank; a world of one has no peers."""
    global _answering
    if dist.get_world_size() == 1:
        return
    _answering = dist.group.WORLD
    store, rank = control.store(), dist.get_rank()
    store.set(f"roll/host/{rank}", socket.gethostname())

    def answer() -> None:
        try:
            while not store.check(["roll/call"]):
                time.sleep(poll_s)
            store.set(f"roll/here/{rank}", "1")
        except RuntimeError:
            pass  # the store has ended with the world

    threading.Thread(target=answer, name="roll", daemon=True).start()


def missing(patience_s: float = PATIENCE_S) -> str:
    """Ranks, with their hosts, that do not answer a call within `patience_s`; "" if all do, or nobody was to answer.

    Where the world's store is gone as well, the process that holds it: torchrun's, or rank 0. Not collective; from any thread.
    """
    if not dist.is_initialized() or _answering is not dist.group.WORLD:
        return ""
    try:
        store = control.store()
        store.set("roll/call", "1")
        deadline = time.monotonic() + patience_s
        silent = list(range(dist.get_world_size()))
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"roll/here/{rank}"])]
            time.sleep(min(0.2, patience_s / 10))
        return ", ".join(_named(store, rank) for rank in silent)
    except RuntimeError:
        return "rank 0 or its launcher, which holds the store of the world"


def peers_lost(error: RuntimeError, patience_s: float = PATIENCE_S) -> PeerLost | None:
    """For an error that may be the end of a peer: PeerLost with the ranks that are missing, None where none is."""
    lost = "" if isinstance(error, control.RankError) else missing(patience_s)
    return (
        PeerLost(f"no answer from {lost}: ended, or cut off. Here it was seen as: {error}") if lost else None
    )


def _named(store: dist.Store, rank: int) -> str:
    host = f"roll/host/{rank}"
    return f"rank {rank}" + (f" on {store.get(host).decode()}" if store.check([host]) else "")
