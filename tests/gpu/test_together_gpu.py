"""Trainer and servers on one GPU: what is lent is the device's, and a server opens weights where they lie."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gtpo_megatron.rollout.sglang.weights.buckets import SharedBucket, pack
from gtpo_megatron.rollout.sglang.weights.pickled import gpu_handle
from tests.tiny_models import make_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).parents[2]
JOB = (sys.executable, "-m", "tests.gpu.together_jobs")


def test_lent_memory_is_free_on_the_device_and_steps_are_the_same(tmp_path: Path) -> None:
    """Some 100 M parameters, so that the allocator's segments do not hide what is freed."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    checkpoint = make_tiny_checkpoint(tmp_path / "model", "llama", **sizes, initializer_range=0.02)
    done = subprocess.run(
        [*JOB, "lend", str(checkpoint), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"] and result["pinned"] and len(result["freed"]) == 2
    for freed in result["freed"]:
        assert freed["lent"] > 1e9
        assert freed["allocated"] >= 0.99 * freed["lent"]
        assert freed["free"] >= 0.9 * freed["lent"]  # of which the driver knows, and so a server


def test_a_bucket_is_opened_where_it_lies() -> None:
    """By another process, without a copy of its own; what changes here changes there."""
    weights = [(f"layer.{i}", torch.full((64 << 20,), float(i + 1), device="cuda")) for i in range(2)]
    (bucket,) = pack(weights, 1 << 30)
    number, handle = gpu_handle(bucket)
    assert number == torch.cuda.current_device()
    with subprocess.Popen(
        [*JOB, "receive"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdin is not None and receiver.stdout is not None
        for factor in (1, 2):
            print(handle if factor == 1 else gpu_handle(bucket)[1], file=receiver.stdin, flush=True)
            answer = json.loads(receiver.stdout.readline())
            assert answer["sums"] == {f"layer.{i}": factor * (i + 1) * float(64 << 20) for i in range(2)}
            assert answer["taken"] < bucket.nbytes / 2  # the sums' workspace, no copy
            bucket.flat.view(torch.float32).mul_(2)
            torch.cuda.synchronize()
        receiver.stdin.close()


def test_the_copy_for_late_servers_has_no_handle() -> None:
    (packed,) = pack([("a", torch.ones(8, device="cuda"))], 1 << 20)
    bucket = SharedBucket(packed.names, packed.dtypes, packed.shapes, packed.flat, {0: "a handle"})
    copy = bucket.cpu()
    assert not isinstance(copy, SharedBucket) and copy.flat.device.type == "cpu"
