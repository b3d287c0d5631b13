"""Weights on their way to the servers: named tensors packed into flat buckets, and a copy kept for late comers."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from gtpo_megatron.rollout.protocol import NamedTensor


@dataclass(frozen=True, eq=False)
class Bucket:
    """Tensors laid end to end, without padding, in one flat uint8 tensor."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]
    flat: torch.Tensor  # [bytes] uint8

    def tensors(self) -> Iterator[NamedTensor]:
        """The named tensors, as views of `flat`."""
        start = 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            end = start + shape.numel() * dtype.itemsize
            yield name, self.flat[start:end].view(dtype).view(shape)
            start = end

    def cpu(self, into: torch.Tensor | None = None) -> "Bucket":
        """The same bucket in host memory, in `into` if that has its size; itself where it already is."""
        if self.flat.device.type == "cpu":
            return self
        fits = into is not None and into.numel() == self.flat.numel()
        return replace(self, flat=into.copy_(self.flat) if fits else self.flat.cpu())


def pack(
    weights: Iterable[NamedTensor], max_bytes: int, memory: Sequence[torch.Tensor] = ()
) -> Iterator[Bucket]:
    """Pack a stream of tensors, in its order, into buckets of at most `max_bytes` (a larger tensor fills its own).

    A bucket also ends where the next tensor would start at an offset that its type cannot be viewed at. The flat tensors
    of `memory` are used again where size and device are those of the bucket of the same number: touching new memory
    takes several times as long as copying into it.
    """
    held: list[NamedTensor] = []
    size = 0
    unused = iter(memory)
    for name, tensor in weights:
        if held and (size + tensor.nbytes > max_bytes or size % tensor.dtype.itemsize):
            yield _bucket(held, next(unused, None))
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield _bucket(held, next(unused, None))


def _bucket(named: list[NamedTensor], memory: torch.Tensor | None) -> Bucket:
    parts = [tensor.detach().reshape(-1).view(torch.uint8) for _, tensor in named]
    size = sum(part.numel() for part in parts)
    fits = memory is not None and memory.numel() == size and memory.device == parts[0].device
    flat = torch.cat(parts, out=memory if fits else None)
    if flat.is_cuda:  # it is sent from another thread, on that thread's stream
        torch.cuda.current_stream(flat.device).synchronize()
    names, tensors = zip(*named, strict=True)
    return Bucket(names, tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors), flat)


@dataclass
class Snapshot:
    """The weights last exported, kept so that a server can be brought to them without asking the trainer's ranks again.

    In host memory (the size of the model, on the rank that drives the servers), or with a directory as a Hugging Face
    checkpoint's safetensors files, which servers load themselves.
    """

    version: int
    directory: Path | None = None
    memory: Sequence[torch.Tensor] = ()  # flat tensors that nobody needs any more
    buckets: list[Bucket] = field(default_factory=list)
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
