"""What stands under a run: GPUs, and which parts of Transformer Engine are installed. One truth for rules and doctor."""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with FP8 tensor cores
# What Transformer Engine's FP8 recipes ask for: compute capability, and the CUDA version that torch is built for.
FP8_NEEDS = {
    "tensorwise": (FP8_CAPABILITY, (12, 1)),
    "delayed": (FP8_CAPABILITY, (12, 1)),
    "blockwise": ((9, 0), (12, 9)),
}
FUSED_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"  # apex's module
INSTALL_TE = "pip install --no-build-isolation -r requirements/cluster.txt (see the notes there)"


@dataclass(frozen=True)
class Machine:
    """What of this machine the rules look at."""

    cuda_capability: tuple[int, int] | None  # None: no CUDA
    transformer_engine: bool  # installed whole, its compiled core included
    gpus: int = 0  # that this process sees
    local_ranks: int = 1  # of the trainer here
    cuda_version: tuple[int, int] | None = None  # that torch is built for; None: unknown or no CUDA
    engine_fault: str | None = None  # see `transformer_engine_fault`
    flash_attention: bool = True  # installed; taken to be there where nobody has looked


def this_machine() -> Machine:
    """Look at the machine. Imports torch."""
    import torch

    engine = all(transformer_engine_parts())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fault = transformer_engine_fault()
    if not torch.cuda.is_available():
        return Machine(None, engine, local_ranks=ranks, engine_fault=fault)
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return Machine(
        torch.cuda.get_device_capability(),
        engine,
        torch.cuda.device_count(),
        ranks,
        (int(major), int(minor)),
        fault,
        importlib.util.find_spec("flash_attn") is not None,
    )


def transformer_engine_fault() -> str | None:
    """What is wrong with a Transformer Engine that cannot be imported, and what to do; None where it is whole or not there.

    Without its core or its PyTorch extension, or with parts of different versions, `import megatron.core` fails,
    whichever layers are asked for.
    """
    package, core, extension = transformer_engine_parts()
    if not package:
        return None
    versions = transformer_engine_versions()
    if not core:
        wrong = "without its compiled core"
    elif not extension:
        wrong = "without its PyTorch extension (transformer-engine-torch)"
    elif len(set(versions.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        wrong = f"in parts of different versions ({listed})"
    else:
        return None
    return (
        f"Transformer Engine is installed {wrong}, which breaks `import megatron.core`: "
        f"pip uninstall transformer-engine; or, for GPUs, {INSTALL_TE}"
    )


def transformer_engine_versions() -> dict[str, str]:
    """Versions of those of its packages that are installed from wheels; its own import refuses any difference."""
    found = {}
    for part in ("", "-cu12", "-cu13", "-torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"transformer-engine{part}"] = metadata.version(f"transformer-engine{part}")
    return found


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
