"""Loading checkpoints from strangers without executing anything in them.

Three places of a torch distributed checkpoint are pickles, and a pickle can run any code: its `.metadata`, Megatron's
`common.pt`, and every object that is not a tensor. Inside `safe_loading()` the first is read by an unpickler that knows
nothing but the classes such a file consists of, and torch.load refuses whatever its weights-only unpickler refuses, also
where a library asks for the unsafe one. All else in our checkpoints is JSON, YAML or safetensors.
"""

import contextlib
import functools
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import Metadata, filesystem

from gtpo_megatron.policy.checkpoint.files import DamagedCheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_ALLOWED = frozenset(
    {
        *(
            (_METADATA, name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the plain data classes of a `.metadata` file, and no function that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _load_metadata(file: BinaryIO) -> Metadata:
    metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f"it points outside the checkpoint: {info.relative_path!r}")
    return metadata


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Within, torch.load and torch.distributed.checkpoint execute nothing that a file asks for."""
    original = torch.load

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **(kwargs | {"weights_only": True, "pickle_module": None}))

    torch.load, filesystem.pickle = load, SimpleNamespace(load=_load_metadata, dump=pickle.dump)
    try:
        yield
    finally:
        torch.load, filesystem.pickle = original, pickle


def read_metadata(directory: Path) -> Metadata:
    """The `.metadata` of a distributed checkpoint: names, shapes and types of its tensors.

    Raises DamagedCheckpointError for anything but plain metadata, before any of it takes effect.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            return _load_metadata(file)
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
    ) as e:
        raise DamagedCheckpointError(f"{path}: refused, it is not plain checkpoint metadata: {e}") from e
