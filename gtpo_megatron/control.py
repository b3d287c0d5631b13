"""The control plane: what ranks say to each other beside the tensors of training.

It has a gloo group of its own, so that ranks which wait for rank 0 (that waits for servers) sleep on a socket instead of
keeping a GPU busy with a kernel of NCCL's. Each verb moves only what its receiver needs: nothing is gathered by all. A rank
that fails inside a verb fails on every rank: a value that cannot be pickled is an error, never a hang.

All verbs but `post` and `posted` are collective over the whole world, and cost nothing but the call where the world is one
rank.
"""

import importlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gtpo_megatron.errors import UserError

T = TypeVar("T")

# The time limits of all groups. On the control group all wait while rank 0 samples from servers, or waits for them to come
# back. Inside a step ranks wait only for each other: a peer that hangs there is to be found sooner.
WAIT_LIMIT = timedelta(hours=2)
STEP_LIMIT = timedelta(minutes=30)
TEXT_BYTES = 2048  # of a failure's text, cut to it
_group: tuple[object, dist.ProcessGroup] | None = (
    None  # the world it is for, so that another world makes another
)


class RankError(RuntimeError):
    """A fault of the program on another rank, of which only the text is known here."""


@dataclass(frozen=True)
class Agreement:
    """What `agree` found: the first rank whose flag was set, and its text."""

    rank: int
    text: str


def group() -> dist.ProcessGroup:
    """The control group; made at the first call in a world, which is therefore collective."""
    global _group
    world = dist.group.WORLD
    if _group is None or _group[0] is not world:
        _group = (world, dist.new_group(backend="gloo", timeout=WAIT_LIMIT))
    return _group[1]


def store() -> dist.Store:
    """The world's store, under this project's names. Raises RuntimeError where it is gone."""
    return dist.PrefixStore("gtpo_megatron", dist.distributed_c10d._get_default_store())


def allow_waits(seconds: float) -> None:
    """Let rank 0 keep the others waiting on the control group for so much longer than WAIT_LIMIT. On every rank.

    For waits that the configuration allows it beside sampling, such as servers that start or are gone.
    """
    dist.distributed_c10d._set_pg_timeout(WAIT_LIMIT + timedelta(seconds=seconds), group())


def agree(flag: bool, text: str = "") -> Agreement | None:
    """The first rank that sets its flag, with its text (TEXT_BYTES of it at most); None on all if none does.

    Without a flag it moves 8 bytes a rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return Agreement(0, text) if flag else None
    first = torch.tensor([rank if flag else size])
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group())
    return None if first == size else Agreement(int(first), _text_of(int(first), text))


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what the first rank with an error brings: its own error there, elsewhere one of its kind.

    A UserError arrives as the same kind of UserError with the same text; anything else as a RankError that names rank and
    type, so that nothing has to be picklable.
    """
    found = agree(error is not None, "" if error is None else _described(error))
    if found is not None:
        if error is not None and found.rank == dist.get_rank():
            raise error
        raise _restored(found) from error


def largest(values: Sequence[float]) -> list[float]:
    """Of each of the values, of which every rank brings as many, the largest that any rank brings."""
    if dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group())
    return tensor.tolist()


def post(word: str) -> None:
    """Say a word that other ranks may look for (`posted`) whenever they like. Not collective; from any thread."""
    if dist.get_world_size() > 1:
        store().set(word, "1")


def posted(word: str) -> bool:
    """Whether any rank has posted the word in this world. Not collective; from any thread."""
    return dist.get_world_size() > 1 and bool(store().check([word]))


def broadcast_from_zero(value: T | None = None) -> T:
    """Rank 0's value on every rank; those of the others do not travel."""
    if dist.get_world_size() == 1:
        return value
    (packed,) = _packed_together([value] if dist.get_rank() == 0 else [None])
    size = torch.tensor([len(packed)])
    dist.broadcast(size, src=0, group=group())
    if dist.get_rank():
        packed = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(packed, src=0, group=group())
    return value if dist.get_rank() == 0 else _unpacked(packed)


def scatter(parts: Sequence[T] | None = None) -> T:
    """This rank's part of rank 0's list, which has one for each rank. The same object for several ranks is packed once.

    Raises ValueError on every rank if there are not as many parts as ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong = None
    if rank == 0 and (parts is None or len(parts) != size):
        wrong = ValueError(f"{0 if parts is None else len(parts)} parts for {size} ranks")
    raise_together(wrong)
    if size == 1:
        return parts[0]
    once = {id(part): part for part in parts[1:]} if rank == 0 else {}
    packed_of = dict(zip(once, _packed_together(list(once.values())), strict=True))
    length = torch.empty(1, dtype=torch.int64)
    if rank == 0:
        packed = [packed_of[id(part)] for part in parts[1:]]
        lengths = [torch.tensor([len(p)]) for p in (torch.empty(0), *packed)]
        dist.scatter(length, lengths, src=0, group=group())
        for work in [dist.isend(p, dst=r, group=group()) for r, p in enumerate(packed, start=1)]:
            work.wait()
        return parts[0]
    dist.scatter(length, None, src=0, group=group())
    received = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(received, src=0, group=group())
    return _unpacked(received)


def gather_to_zero(value: T) -> list[T] | None:
    """All ranks' values, in order, on rank 0; None elsewhere. A value that cannot be pickled is raised on all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return [value]
    (packed,) = _packed_together([value if rank else None])
    length = torch.tensor([len(packed)])
    if rank:
        dist.gather(length, None, dst=0, group=group())
        dist.send(packed, dst=0, group=group())
        return None
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
    dist.gather(length, lengths, dst=0, group=group())
    values = [value]
    for source in range(1, size):  # one at a time: rank 0 holds one packed value beside those it keeps
        received = torch.empty(int(lengths[source]), dtype=torch.uint8)
        dist.recv(received, src=source, group=group())
        values.append(_unpacked(received))
    return values


def _packed_together(values: Sequence[Any]) -> list[Tensor]:
    """The values as bytes; what cannot be pickled on one rank is raised on all, before anything is sent. Collective."""
    packed, error = [], None
    try:
        packed = [_bytes(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)) for value in values]
    except Exception as caught:
        error = caught
    raise_together(error)
    return packed


def _unpacked(packed: Tensor) -> Any:
    return pickle.loads(packed.numpy().data)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text_of(rank: int, text: str) -> str:
    """The text of one rank on all, in a tensor of a fixed size."""
    content = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
    if rank == dist.get_rank() and text:
        data = text.encode()[:TEXT_BYTES]
        content[: len(data)] = _bytes(data)
    dist.broadcast(content, src=rank, group=group())
    return content.numpy().tobytes().rstrip(b"\0").decode(errors="ignore")


def _described(error: Exception) -> str:
    kind = type(error)
    if isinstance(error, UserError):
        return f"{kind.__module__}:{kind.__qualname__}\n{error}"
    return f"\n{kind.__name__}: {error}"


def _restored(found: Agreement) -> Exception:
    kind, _, text = found.text.partition("\n")
    if not kind:
        return RankError(f"rank {found.rank}: {text}")
    module, _, name = kind.partition(":")
    known = getattr(importlib.import_module(module), name, UserError)  # the same program runs on every rank
    return known(text) if isinstance(known, type) and issubclass(known, UserError) else UserError(text)
