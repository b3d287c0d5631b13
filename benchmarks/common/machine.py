"""What the figures of every benchmark depend on."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> dict[str, object]:
    """Processor, cores, threads of torch in this process, load of the last minute, versions. No names, no paths."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
