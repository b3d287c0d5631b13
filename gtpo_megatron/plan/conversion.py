"""What can be known to be wrong with a conversion within a second, before torch is imported or a rank started."""

import json
from pathlib import Path
from typing import Literal

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import ARCHITECTURES

MANIFEST = "manifest.json"
NAMES = {"hf": "a Hugging Face directory (config.json)", "megatron": f"a Megatron checkpoint ({MANIFEST})"}


def check_source(source: Path, kind: Literal["hf", "megatron"] | None = None) -> None:
    """Is it there, of that kind (None: of either), and of a family that the policy supports?

    Raises:
        UserError: naming the path, and what it is instead.
    """
    if not source.exists():
        raise UserError(f"{source}: no such directory")
    found = _kind(source)
    if found is None:
        raise UserError(f"{source}: neither {NAMES['megatron']} nor {NAMES['hf']}")
    if kind is not None and found != kind:
        raise UserError(f"{source}: is {NAMES[found]}; this command reads {NAMES[kind]}")
    config = source / "config.json" if found == "hf" else source / "hf" / "config.json"
    if config.is_file():
        _check_architecture(config)


def check_output(output: Path) -> None:
    """Raises UserError where the directory to write exists already."""
    if output.exists():
        raise UserError(f"{output}: exists already; name a new directory, or remove it")


def _kind(source: Path) -> Literal["hf", "megatron"] | None:
    if (source / MANIFEST).is_file() or (source / "weights" / ".metadata").is_file():
        return "megatron"
    return "hf" if (source / "config.json").is_file() else None


def _check_architecture(path: Path) -> None:
    try:
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["none"]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a model's configuration: {error}") from error
    if architectures[0] not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architectures[0]} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
