"""Installed packages: their versions, the pins that they are held against, and where they came from."""

import json
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

Status = Literal["ok", "absent", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    status: Status
    found: str
    source: str = ""  # where the package came from
    advice: str = ""  # what to do about it

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def origin(name: str) -> str:
    """Where an installed distribution came from: a repository, a local folder, an index, or a system's own folder."""
    distribution = metadata.distribution(name)
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in direct:
        return f"{direct['url']}@{direct['vcs_info'].get('commit_id', '?')[:9]}"
    if direct:
        return direct["url"]
    folder = Path(str(distribution.locate_file("")))
    if not folder.is_relative_to(sys.prefix):
        return f"{folder} (outside this environment)"
    return f"package index ({(distribution.read_text('INSTALLER') or 'unknown installer').strip()})"


def version_of(name: str) -> str | None:
    """An installed distribution's version; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pinned_version(name: str) -> str | None:
    """The version that this project's own metadata pins for a package, on this Python."""
    requirements = (Requirement(text) for text in metadata.requires("gtpo-megatron") or [])
    matching = (
        r for r in requirements if r.name == name and (r.marker is None or r.marker.evaluate({"extra": ""}))
    )
    return next((spec.version for r in matching for spec in r.specifier if spec.operator == "=="), None)


def required_package(name: str, install: str) -> Finding:
    """A package that training cannot do without, against its pin."""
    version = version_of(name)
    if version is None:
        return Finding(name, "error", "not installed", advice=install)
    pin = pinned_version(name) if version_of("gtpo-megatron") else None
    if pin is not None and Version(version).public != Version(pin).public:
        return Finding(
            name, "warning", f"{version}, tested with {pin}", origin(name), f"pip install {name}=={pin}"
        )
    return Finding(name, "ok", version, origin(name))
