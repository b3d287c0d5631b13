"""What stands under a run: GPUs, and which parts of Transformer Engine are installed. One truth for rules and doctor."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with FP8 tensor cores


@dataclass(frozen=True)
class Machine:
    """What of this machine the rules look at."""

    cuda_capability: tuple[int, int] | None  # None: no CUDA
    transformer_engine: bool  # installed whole, its compiled core included
    gpus: int = 0  # that this process sees
    local_ranks: int = 1  # of the trainer here


def this_machine() -> Machine:
    """Look at the machine. Imports torch."""
    import torch

    engine = all(transformer_engine_parts())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        return Machine(None, engine, local_ranks=ranks)
    return Machine(torch.cuda.get_device_capability(), engine, torch.cuda.device_count(), ranks)


def transformer_engine_parts() -> tuple[bool, bool, bool]:
    """Whether Transformer Engine's Python package, its compiled core and its PyTorch extension are installed.

    Looks at files only: importing an incomplete Transformer Engine may end the process.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return False, False, False
    site = Path(spec.submodule_search_locations[0]).parent
    installed = [
        *site.glob("*transformer_engine*"),
        *site.glob("transformer_engine/**/*transformer_engine*.so"),
    ]
    names = [path.name for path in installed]
    core = any(name.startswith(("libtransformer_engine", "transformer_engine_cu")) for name in names)
    return True, core, any(name.startswith("transformer_engine_torch") for name in names)
