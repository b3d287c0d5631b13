"""Packaging. The pins stand in requirements/*.txt and nowhere else; this file reads them."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def pins(name: str) -> list[str]:
    """Requirements of requirements/<name>.txt, without comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def version() -> str:
    """The package's version, read without importing it."""
    return re.search(r'__version__ = "(.+)"', (ROOT / "gtpo_megatron/__init__.py").read_text()).group(1)


readme = ROOT / "README.md"
setup(
    name="gtpo-megatron",
    version=version(),
    description="GTPO at scale: a Megatron-Core training recipe for Group-relative Trajectory-based Policy Optimization",
    long_description=readme.read_text() if readme.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=find_namespace_packages(include=["gtpo_megatron", "gtpo_megatron.*"]),
    include_package_data=True,
    install_requires=pins("trainer"),
    extras_require={name: pins(name) for name in ("cluster", "dev", "wandb")},
    entry_points={"console_scripts": ["gtpo-megatron = gtpo_megatron.commands.cli:main"]},
)
