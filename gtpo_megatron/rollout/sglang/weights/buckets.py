"""Weights on their way to the servers: named tensors packed into flat buckets, and a copy kept for late comers."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from gtpo_megatron.rollout.protocol import NamedTensor


@dataclass(frozen=True, eq=False)
class Layout:
    """What lies in a bucket: tensors end to end, without padding."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pairs = zip(self.dtypes, self.shapes, strict=True)
        return sum(shape.numel() * dtype.itemsize for dtype, shape in pairs)

    def views(self, flat: torch.Tensor) -> Iterator[NamedTensor]:
        """The named tensors, as views of a flat tensor [bytes] of uint8."""
        start = 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            end = start + shape.numel() * dtype.itemsize
            yield name, flat[start:end].view(dtype).view(shape)
            start = end


@dataclass(frozen=True, eq=False)
class Bucket(Layout):
    """Tensors in one flat tensor."""

    flat: torch.Tensor  # [bytes] uint8

    def tensors(self) -> Iterator[NamedTensor]:
        """The named tensors, as views of `flat`."""
        return self.views(self.flat)

    def cpu(self, into: torch.Tensor | None = None) -> "Bucket":
        """The same bucket in host memory, in `into` if that has its size; itself where it already is."""
        if self.flat.device.type == "cpu":
            return self
        fits = into is not None and into.numel() == self.flat.numel()
        return replace(self, flat=into.copy_(self.flat) if fits else self.flat.cpu())


@dataclass(frozen=True, eq=False)
class SharedBucket(Bucket):
    """A bucket that lies on several GPUs, on each the same: what a server on them is to open, by the GPU's number."""

    handles: Mapping[int, str] = field(default_factory=dict)

    def cpu(self, into: torch.Tensor | None = None) -> Bucket:
        """A copy in host memory, which no handle leads to."""
        copied = super().cpu(into)
        return Bucket(copied.names, copied.dtypes, copied.shapes, copied.flat)


def pack(
    weights: Iterable[NamedTensor], max_bytes: int, memory: Sequence[torch.Tensor] = ()
) -> Iterator[Bucket]:
    """Pack a stream of tensors, in its order, into buckets of at most `max_bytes` (a larger tensor fills its own).

    A bucket also ends where the next tensor would start at an offset that its type cannot be viewed at. The flat tensors
    of `memory` are used again where size and device are those of the bucket of the same number: touching new memory
    takes several times as long as copying into it.
    """
    unused = iter(memory)
    for named in _divided(weights, max_bytes):
        yield _bucket(named, next(unused, None))


def lay_out(weights: Iterable[NamedTensor], max_bytes: int) -> list[Layout]:
    """The buckets that `pack` would make of the tensors, of which only types and shapes count."""
    return [Layout(*_described(named)) for named in _divided(weights, max_bytes)]


def fill(
    layouts: Sequence[Layout], weights: Iterable[NamedTensor], memory: Sequence[torch.Tensor] = ()
) -> Iterator[Bucket]:
    """Fill buckets with a stream of the tensors that they are laid out for; `memory` as in `pack`.

    Each tensor is copied as it comes, so that there is one bucket beside it, where `pack` holds the tensors of a bucket and
    then the bucket. Raises RuntimeError where the stream brings something else.
    """
    stream = iter(weights)
    for number, layout in enumerate(layouts):
        flat, place = None, iter(())
        for expected in zip(layout.names, layout.dtypes, layout.shapes, strict=True):
            name, tensor = next(stream, ("nothing", torch.empty(0)))
            if (name, tensor.dtype, tensor.shape) != expected:
                raise RuntimeError(
                    f"the export brought {name} {tuple(tensor.shape)} in place of {expected[0]}"
                )
            if flat is None:
                flat = _memory(memory[number] if number < len(memory) else None, layout.nbytes, tensor.device)
                place = layout.views(flat)
            next(place)[1].copy_(tensor.detach())
        yield _finished(Bucket(layout.names, layout.dtypes, layout.shapes, flat))
    if (more := next(stream, None)) is not None:
        raise RuntimeError(f"the export brought {more[0]}, of which nothing was known")


def _divided(weights: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    held: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        if held and (size + tensor.nbytes > max_bytes or size % tensor.dtype.itemsize):
            yield held
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield held


def _bucket(named: list[NamedTensor], memory: torch.Tensor | None) -> Bucket:
    parts = [tensor.detach().reshape(-1).view(torch.uint8) for _, tensor in named]
    flat = _memory(memory, sum(part.numel() for part in parts), parts[0].device)
    return _finished(Bucket(*_described(named), torch.cat(parts, out=flat)))


def _memory(offered: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    fits = offered is not None and offered.numel() == size and offered.device == device
    return offered if fits else torch.empty(size, dtype=torch.uint8, device=device)


def _described(
    named: list[NamedTensor],
) -> tuple[tuple[str, ...], tuple[torch.dtype, ...], tuple[torch.Size, ...]]:
    names, tensors = zip(*named, strict=True)
    return names, tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors)


def _finished(bucket: Bucket) -> Bucket:
    if bucket.flat.is_cuda:  # it is sent from another thread, on that thread's stream
        torch.cuda.current_stream(bucket.flat.device).synchronize()
    return bucket


@dataclass
class Snapshot:
    """The weights last exported, kept so that a server can be brought to them without asking the trainer's ranks again.

    In host memory (the size of what this rank sends: the model, or its pipeline stage), or with a directory as a Hugging Face
    checkpoint's safetensors files, which servers load themselves.
    """

    version: int
    directory: Path | None = None
    memory: Sequence[torch.Tensor] = ()  # flat tensors that nobody needs any more
    buckets: list[Bucket] = field(
        default_factory=list
    )  # on rank 0 behind its own those that other ranks keep
    _files: dict[str, str] = field(default_factory=dict)

    def add(self, bucket: Bucket) -> None:
        """Keep one more bucket."""
        if self.directory is None:
            number = len(self.buckets)
            self.buckets.append(bucket.cpu(self.memory[number] if number < len(self.memory) else None))
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        file = f"model-{len(set(self._files.values())):05d}.safetensors"
        save_file({name: tensor.clone() for name, tensor in bucket.cpu().tensors()}, self.directory / file)
        self._files |= dict.fromkeys(bucket.names, file)

    def finish(self) -> None:
        """Write the index: the directory can be loaded from now on."""
        if self.directory is not None:
            index = {"metadata": {}, "weight_map": self._files}
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def delete(self) -> None:
        """Free the memory or remove the files."""
        self.buckets.clear()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
