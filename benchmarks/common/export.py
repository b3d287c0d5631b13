"""Export of a policy's weights under Hugging Face's names: whether every bit comes out, and how fast. For benchmarks/gpu.py."""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open

from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.policy import platform


def measure(model: Path) -> dict[str, float]:
    """Export twice, in bfloat16; the second is timed. Raises ValueError if a tensor is not the checkpoint's."""
    from gtpo_megatron.policy.model import build_policy, export_hf_weights, initialize_parallel

    platform.init_process_group()
    initialize_parallel(ParallelConfig(), seed=0)
    section = ModelConfig(path=str(model), dtype="bf16")
    policy = build_policy(section, ParallelConfig(), TrainingConfig(steps=1), trained=False)
    stored = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()  # the file is no mapping
            stored |= {name: tensors.get_tensor(name) for name in names}
    exported = dict(export_hf_weights(policy))
    wrong = [name for name in stored if name not in exported or not torch.equal(stored[name], exported[name])]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(stored)} tensors come out changed, {wrong[0]} among them")
    del exported
    platform.synchronize()
    start, size = time.perf_counter(), 0
    for _, tensor in export_hf_weights(policy):
        size += tensor.nbytes
    seconds = time.perf_counter() - start
    return {
        "tensors": len(stored),
        "gib": size / 2**30,
        "seconds": seconds,
        "gib_per_s": size / 2**30 / seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    print(json.dumps(measure(parser.parse_args().model)))
