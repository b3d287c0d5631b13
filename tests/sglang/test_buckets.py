"""Packing of weights into buckets, and the copies kept of them."""

import base64
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot, pack
from gtpo_megatron.rollout.sglang.weights.pickled import pickle_tensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn])
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(DTYPES, SHAPES), max_size=12), st.integers(1, 200))
def test_buckets_keep_order_and_bytes_and_respect_size_and_alignment(
    kinds: list[tuple[torch.dtype, list[int]]], max_bytes: int
) -> None:
    weights = [(f"w{i}", torch.randn(shape).to(dtype)) for i, (dtype, shape) in enumerate(kinds)]
    buckets = list(pack(iter(weights), max_bytes))
    unpacked = [pair for bucket in buckets for pair in bucket.tensors()]
    assert [name for name, _ in unpacked] == [name for name, _ in weights]
    for (_, ours), (_, theirs) in zip(unpacked, weights, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.reshape(-1).view(torch.uint8).equal(theirs.reshape(-1).view(torch.uint8))
    for bucket in buckets:
        assert bucket.flat.numel() <= max_bytes or len(bucket.names) == 1


def test_memory_of_the_right_size_is_used_again() -> None:
    weights = [(f"w{i}", torch.randn(10 + i)) for i in range(4)]
    first = list(pack(weights, 100))
    assert len(first) == 2
    memory = [first[0].flat, torch.empty(7, dtype=torch.uint8)]
    again = list(pack([(name, tensor + 1) for name, tensor in weights], 100, memory))
    assert again[0].flat.data_ptr() == first[0].flat.data_ptr()
    unpacked = [tensor for bucket in again for _, tensor in bucket.tensors()]
    assert all(ours.equal(theirs + 1) for ours, (_, theirs) in zip(unpacked, weights, strict=True))
    assert memory[1].numel() == 7


def test_a_snapshot_in_a_directory_is_a_checkpoint(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(8, 8).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(6)}
    snapshot = Snapshot(4, tmp_path / "weights-4")
    for bucket in pack(weights.items(), 600):
        snapshot.add(bucket)
    snapshot.finish()
    files = sorted((tmp_path / "weights-4").glob("*.safetensors"))
    assert len(files) > 1
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == weights.keys()
    assert all(loaded[name].equal(weights[name]) for name in weights)
    snapshot.delete()
    assert not (tmp_path / "weights-4").exists()


def test_pickled_tensors_name_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def stricter(content: bytes) -> None:
        raise AssertionError("a server has no such function")

    def names(pickled: bytes) -> set[str]:
        return {str(value) for code, value, _ in pickletools.genops(pickled) if "UNICODE" in code.name}

    weights = [("a", torch.randn(3, 4)), ("b", torch.randn(5).bfloat16())]
    expected = names(base64.b64decode(pickle_tensors(weights)))
    monkeypatch.setattr(torch.storage, "_load_from_bytes", stricter)  # as megatron-core does
    pickled = base64.b64decode(pickle_tensors(weights))
    assert names(pickled) == expected >= {"torch.storage", "_load_from_bytes"}
    monkeypatch.undo()
    assert all(
        ours.equal(theirs) for (_, ours), (_, theirs) in zip(pickle.loads(pickled), weights, strict=True)
    )
