"""What test_together_gpu.py runs in processes of their own: one that has used CUDA cannot fork, and keeps a GPU's memory."""

import base64
import io
import json
import pickle
import sys
from pathlib import Path

import torch

from tests.policy import training

GIB = 2**30


def lending(checkpoint: str, directory: str) -> dict[str, object]:
    """Three steps with memory lent before each, and three without; bytes that the device has back while they are lent."""
    from megatron.core import parallel_state

    from gtpo_megatron.policy import platform
    from gtpo_megatron.policy.lending import Lender
    from gtpo_megatron.policy.memory import held_bytes, own_tensors

    platform.init_process_group()
    results, freed = [], []
    for name in ("lending", "keeping"):
        config = training.run_config(
            Path(directory), Path(checkpoint), model={"dtype": "bf16"}, optimizer={"distributed": True}
        )
        policy, optimizer, _ = training.start(config)
        lender = Lender(policy, optimizer)
        done = []
        for step in range(3):
            if name == "lending":
                before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
                lender.lend()
                held = held_bytes([policy], optimizer)
                # (the first time makes Adam's moments, and so frees less than it lends)
                freed.append(
                    {
                        "allocated": before - torch.cuda.memory_allocated(),
                        "free": torch.cuda.mem_get_info()[0] - free,
                        "lent": held["gradients"] + held["optimizer"],
                    }
                )
                pinned = all(t.is_pinned() for t in own_tensors(optimizer, [policy]) if t.numel() > 1)
                lender.take_back()
            done += training.steps(config, policy, optimizer, [step])
        digests = [
            (tensor.double().sum().item(), tensor.double().square().sum().item())
            for chunk in policy.modules
            for tensor in chunk.parameters()
        ]
        results.append((done, digests))
        del policy, optimizer, lender
        parallel_state.destroy_model_parallel()
    return {"freed": freed[1:], "pinned": pinned, "equal": results[0] == results[1]}


def receive() -> None:
    """A server's side: open handles from standard input, add up what is there, and say how much memory that took."""
    torch.zeros(1, device="cuda")  # a context, whose memory is not the tensors'
    for line in sys.stdin:
        free = torch.cuda.mem_get_info()[0]
        named = pickle.load(io.BytesIO(base64.b64decode(line)))
        sums = {name: tensor.sum(dtype=torch.float64).item() for name, tensor in named}
        taken = free - torch.cuda.mem_get_info()[0]
        del named
        print(json.dumps({"sums": sums, "taken": taken}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive()
    else:
        print(json.dumps(lending(*sys.argv[2:])))
