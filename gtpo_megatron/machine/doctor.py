"""What this machine has and can do, known bad combinations of packages, and what to install."""

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gtpo_megatron.machine.packages import Finding, Status, origin, required_package, version_of
from gtpo_megatron.machine.probe import (
    FP8_CAPABILITY,
    FUSED_WEIGHT_GRADIENT,
    INSTALL_TE,
    transformer_engine_parts,
    transformer_engine_versions,
)

MARKS: dict[Status, str] = {
    "ok": "[green]ok[/]",
    "absent": "[dim]-[/]",
    "warning": "[yellow]warning[/]",
    "error": "[red]error[/]",
}

PAIRS = {"0.16": "0.3", "0.19": "0.6"}  # megatron-core line -> megatron-bridge line
INSTALL_APEX = (
    "install it from NVIDIA's source, github.com/NVIDIA/apex (see requirements/cluster.txt); optional"
)
PROBE_TIMEOUT_S = 120.0


def examine() -> list[Finding]:
    """Run all probes. A probe that fails becomes a warning of its own and never hides the others."""
    findings: list[Finding] = []
    for name, probe in PROBES.items():
        try:
            findings += probe()
        except Exception as error:  # whatever a broken installation raises is a finding
            findings.append(Finding(name, "warning", f"cannot tell: {type(error).__name__}: {error}"))
    return findings


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """The table, then what to do, one line each."""
    table = Table("", "status", "found", "from", title="gtpo-megatron doctor", title_justify="left")
    for finding in findings:
        table.add_row(finding.name, MARKS[finding.status], escape(finding.found), escape(finding.source))
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(
                f"{MARKS[finding.status]} {finding.name}: {escape(finding.advice)}",
                soft_wrap=True,
                highlight=False,
            )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        yield Finding("Python", "ok", version, sys.prefix)
    else:
        yield Finding(
            "Python", "error", version, sys.prefix, "the pins are for Python 3.11 and 3.12: make PYTHON=..."
        )


def _machine() -> Iterator[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{cores} usable, {platform.machine()}, {platform.system()}")
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"
    if memory.available < 4 * 2**30:
        yield Finding(
            "memory",
            "warning",
            found,
            advice="less than 4 GiB is free; the quickstart and the tests need about that",
        )
    else:
        yield Finding("memory", "ok", found)


def _torch() -> Iterator[Finding]:
    package = required_package("torch", "make .venv, or pip install the version in requirements/trainer.txt")
    yield package
    if package.status == "error":
        return
    import torch

    driver = _nvidia_driver()
    if torch.version.cuda is None:
        advice = (
            "there is an NVIDIA driver, but torch is built without CUDA: install torch from the CUDA index"
        )
        found = f"torch is built without CUDA{f'; driver {driver}' if driver else ''}"
        yield Finding("CUDA", "warning" if driver else "absent", found, advice=advice if driver else "")
    elif torch.cuda.is_available():
        yield Finding(
            "CUDA",
            "ok",
            f"{torch.version.cuda}, driver {driver or 'unknown'}, cuDNN {torch.backends.cudnn.version()}",
        )
    else:
        advice = "torch does not reach the GPU: check the driver and CUDA_VISIBLE_DEVICES" if driver else ""
        yield Finding(
            "CUDA",
            "warning" if driver else "absent",
            f"torch is built for {torch.version.cuda}; no GPU",
            advice=advice,
        )
    yield from _gpus(torch)
    if torch.distributed.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())), "torch")
    else:
        yield Finding("NCCL", "absent", "not in this build of torch; ranks talk over gloo")


def _gpus(torch) -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        fp8 = "FP8" if capability >= FP8_CAPABILITY else "no FP8"
        memory = properties.total_memory / 2**30
        yield Finding(
            f"GPU {index}",
            "ok",
            f"{properties.name}, {memory:.0f} GiB, sm_{capability[0]}{capability[1]}, {fp8}",
        )
    if not count:
        yield Finding("GPUs", "absent", "none: bf16 and fp32 on the CPU, no FP8")


def _nvidia_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    answer = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else None


def _megatron_core() -> Iterator[Finding]:
    finding = required_package("megatron-core", "make .venv, or pip install -r requirements/trainer.txt")
    if finding.status == "error":
        yield finding
        return
    # in a process of its own: a broken Transformer Engine or apex may end it
    program = "from gtpo_megatron.policy import platform; platform.install(); import megatron.core.transformer.transformer_layer"
    attempt = _run([sys.executable, "-c", program])
    if attempt.returncode:
        reason = (attempt.stderr.strip().splitlines() or [f"exit status {attempt.returncode}"])[-1]
        advice = "see Transformer Engine and apex below; else make .venv"
        yield Finding(
            finding.name, "error", f"{finding.found}, does not import: {reason}", finding.source, advice
        )
    else:
        yield finding


def _megatron_bridge() -> Iterator[Finding]:
    core, bridge = version_of("megatron-core"), version_of("megatron-bridge")
    install = "pip install --no-deps -r requirements/trainer-nodeps.txt"
    if bridge is None:
        yield Finding("megatron-bridge", "error", "not installed", advice=install)
        return
    expected = PAIRS.get(_line(core)) if core else None
    if expected != _line(bridge):
        pairs = ", ".join(f"core {c} with bridge {b}" for c, b in PAIRS.items())
        found = f"{bridge} beside megatron-core {core}"
        yield Finding(
            "megatron-bridge",
            "warning",
            found,
            origin("megatron-bridge"),
            f"tested pairs: {pairs}; {install}",
        )
    else:
        yield Finding("megatron-bridge", "ok", bridge, origin("megatron-bridge"))


def _line(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _transformers() -> Iterator[Finding]:
    yield required_package("transformers", "make .venv, or pip install -r requirements/trainer.txt")


def _transformer_engine() -> Iterator[Finding]:
    name, meta = "Transformer Engine", version_of("transformer-engine")
    cores = {cuda: v for cuda in ("12", "13") if (v := version_of(f"transformer-engine-cu{cuda}"))}
    package, core, extension = transformer_engine_parts()
    if meta is None and not cores and not package:
        yield Finding(
            name,
            "absent",
            "not installed; local layers are used, and no FP8",
            advice=f"on GPUs: {INSTALL_TE}",
        )
        return
    source = origin("transformer-engine") if meta else str(_package_folder("transformer_engine"))
    if not core:
        yield Finding(
            name,
            "error",
            f"{meta}: the meta package without its compiled core, which breaks `import megatron.core`",
            source,
            f"pip uninstall transformer-engine; or, for GPUs, {INSTALL_TE}",
        )
        return
    if not extension:
        yield Finding(
            name,
            "error",
            f"{meta or '?'}: without its PyTorch part (transformer-engine-torch), which breaks `import megatron.core`",
            source,
            f"pip uninstall transformer-engine; or, for GPUs, {INSTALL_TE}",
        )
        return
    versions = transformer_engine_versions()
    built_for = f"for CUDA {' and '.join(cores)}" if cores else "built from source"
    found = f"{meta or next(iter(cores.values()), '?')}, core {built_for}"
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{part} {version}" for part, version in versions.items())
        problem = f"parts of different versions ({listed}), which breaks `import megatron.core`"
        yield Finding(name, "error", problem, source, INSTALL_TE)
        return
    problem = ""
    if len(cores) > 1:
        problem = "cores for two CUDA versions: uninstall the one that torch is not built for"
    elif cores and (cuda := _torch_cuda()) and cuda.split(".")[0] not in cores:
        problem = f"its core is for CUDA {next(iter(cores))}, torch is built for CUDA {cuda}"
    if problem:
        yield Finding(name, "warning", f"{found}: {problem}", source, INSTALL_TE)
    else:
        yield Finding(name, "ok", found, source)


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _apex() -> Iterator[Finding]:
    folder, version = _package_folder("apex"), version_of("apex")
    if folder is None and version is None:
        yield Finding(
            "apex",
            "absent",
            "not installed; Adam is Transformer Engine's or torch's, weight gradients are made and then added to their buffer",
            advice=f"on GPUs: {INSTALL_APEX}",
        )
        return
    source = origin("apex") if version else str(folder)
    if folder is None or not (folder / "multi_tensor_apply").exists():
        found = f"{version or 'of unknown version'}: not NVIDIA's; PyPI's apex is another project"
        yield Finding("apex", "warning", found, source, f"pip uninstall apex; {INSTALL_APEX}")
    elif importlib.util.find_spec("amp_C") is None:
        found = f"{version or '?'}, NVIDIA's, built without its CUDA extensions"
        yield Finding("apex", "warning", found, source, f"its fused optimizers are missing; {INSTALL_APEX}")
    elif importlib.util.find_spec(FUSED_WEIGHT_GRADIENT) is None:
        found = f"{version or '?'}, NVIDIA's, without {FUSED_WEIGHT_GRADIENT}"
        advice = (
            f"weight gradients are made, then added to their buffer; with it in one product. {INSTALL_APEX}"
        )
        yield Finding("apex", "ok", found, source, advice)
    else:
        found = f"{version or '?'}, NVIDIA's, with CUDA extensions; weight gradients are added to their buffer by their product"
        yield Finding("apex", "ok", found, source)


def _package_folder(name: str) -> Path | None:
    """A top-level package's folder, found without importing it."""
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def _sglang() -> Iterator[Finding]:
    here = version_of("sglang")
    if here is not None:
        advice = "its pins conflict with the trainer's: pip uninstall sglang, then make sglang"
        yield Finding("SGLang", "warning", f"{here} in the trainer's environment", origin("sglang"), advice)
    python = Path(".venv-sglang/bin/python")
    if _is_locked(Path(".venv-sglang.lock")):  # by tools/setup_sglang_env.sh
        yield Finding(
            "SGLang", "absent", "being installed at this moment", ".venv-sglang", "ask again in some minutes"
        )
    elif python.exists():
        yield _sglang_environment(python)
    elif here is None:
        yield Finding(
            "SGLang", "absent", "no .venv-sglang here; the embedded engine is used", advice="make sglang"
        )


def _sglang_environment(python: Path) -> Finding:
    program = (
        "from importlib.metadata import version as v; "
        "print(v('sglang'), 'with torch', v('torch'), 'and transformers', v('transformers'))"
    )
    answer = _run([str(python), "-c", program])
    if answer.returncode == 0:
        return Finding("SGLang", "ok", answer.stdout.strip(), ".venv-sglang")
    found = "its environment is broken or unfinished"
    return Finding("SGLang", "warning", found, ".venv-sglang", "make sglang (it makes the environment anew)")


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock file (flock)."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or the file system has no locks
        return False
    return False


PROBES: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": _python,
    "machine": _machine,
    "torch": _torch,
    "megatron-core": _megatron_core,
    "megatron-bridge": _megatron_bridge,
    "transformers": _transformers,
    "Transformer Engine": _transformer_engine,
    "apex": _apex,
    "SGLang": _sglang,
}
