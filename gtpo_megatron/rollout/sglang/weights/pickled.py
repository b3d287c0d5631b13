"""Tensors inside a request, as SGLang unpickles them."""

import base64
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

import torch

from gtpo_megatron.rollout.sglang.weights.buckets import Bucket


class _StoragePickler(pickle._Pickler):
    """Writes torch's own name for what loads a storage's bytes.

    megatron-core from 0.19 on puts a stricter function of its own in that place, and pickle would write that one's name,
    which a server refuses and dies of. (The C pickler has no hook for the names of functions.)
    """

    def save_function(self, function: Any) -> None:
        if function is not torch.storage._load_from_bytes:
            return self.save_global(function)
        self.save("torch.storage")
        self.save("_load_from_bytes")
        self.write(pickle.STACK_GLOBAL)
        self.memoize(function)

    dispatch = pickle._Pickler.dispatch | {FunctionType: save_function}


def gpu_handle(bucket: Bucket) -> tuple[int, str] | None:
    """The number of the GPU that a bucket lies on, and a handle of its tensors; None in host memory."""
    if not bucket.flat.is_cuda:
        return None
    return bucket.flat.device.index, pickle_tensors(list(bucket.tensors()))


def pickle_tensors(named: list[tuple[str, torch.Tensor]]) -> str:
    """Named tensors as SGLang's servers unpickle them, base64: CUDA tensors as IPC handles, CPU tensors as their bytes.

    torch could share CPU memory as well, but hands out file descriptors by a socket that a server cannot authenticate
    to (it dies), or files through a daemon that outlives the run.
    """
    buffer = io.BytesIO()
    if named[0][1].is_cuda:
        ForkingPickler(buffer).dump(named)
    else:  # a view would bring the whole bucket's bytes with it
        _StoragePickler(buffer).dump([(name, tensor.clone()) for name, tensor in named])
    return base64.b64encode(buffer.getvalue()).decode()
