"""Which run a directory belongs to: what the configuration of a resumed run may change, and what would make it another."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gtpo_megatron import control
from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config, save_config
from gtpo_megatron.errors import UserError

# a resumed run may change these; anything else would make it another run
RESUMABLE = {
    "dir",
    "training",
    "checkpoint",
    "logging",
    "evaluation",
    "parallel",
    "rollout",
    "optimizer",
    "alarm",
}
FIXED = {
    "training": ("seed", "sft_batch_size"),
    "rollout": (
        "engine",
        "prompts_per_step",
        "group_size",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
    ),
    "optimizer": (
        "lr",
        "min_lr",
        "schedule",
        "warmup_steps",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "clip_grad",
    ),
}


def check_same_on_all_ranks(config: RunConfig) -> None:
    """See that every rank was started with rank 0's configuration. Collective.

    Raises UserError on all ranks; it names the first rank that was not, and the keys.
    """
    first = control.broadcast_from_zero(config.model_dump(mode="json"))
    different = list(_unequal(first, config.model_dump(mode="json")))
    rank = dist.get_rank()
    control.raise_together(
        UserError(
            f"rank {rank} was started with another configuration than rank 0: {'; '.join(different[:5])}. "
            "Start all ranks with the same recipe and settings"
        )
        if different
        else None
    )


def _unequal(first: Any, own: Any, key: str = "") -> Iterator[str]:
    if isinstance(first, dict) and isinstance(own, dict):
        for name in sorted(first.keys() | own.keys()):
            yield from _unequal(first.get(name), own.get(name), f"{key}.{name}" if key else name)
    elif first != own:
        yield f"{key}: {own!r}, on rank 0 {first!r}"


def check_directory(config: RunConfig) -> None:
    """Make the run's directory, or check that it is this run's. Raises UserError if it belongs to another."""
    path = config.path / "config.yaml"
    if path.exists():
        differences = list(_differences(load_config(path), config))
        if differences:
            shown = "; ".join(differences[:5])
            raise UserError(
                f"{config.path}: holds a run with another configuration ({shown}). "
                "Give this run another name (name=...), or remove the directory"
            )
    config.path.mkdir(parents=True, exist_ok=True)
    (config.path / "logs").mkdir(exist_ok=True)
    free = shutil.disk_usage(config.path).free
    if free < 2**28:
        raise UserError(
            f"dir: {config.path}: only {free / 2**20:.0f} MiB of disk are free, and a run needs 256"
        )


def keep_config(config: RunConfig) -> None:
    """Write config.yaml; what an earlier start of the run had there, if it was another, becomes config-1.yaml, and so on."""
    path = config.path / "config.yaml"
    if path.exists() and load_config(path) != config:
        number = 1 + sum(1 for _ in config.path.glob("config-*.yaml"))
        path.rename(config.path / f"config-{number}.yaml")
    save_config(config, path)


def remove_leftovers(directory: Path) -> None:
    """Copies of the weights for SGLang servers (a model each), which an owner that was killed could not remove.

    Only the run's owner may call it.
    """
    for pattern in ("weights-*", "verify-*"):
        for copy in (directory / "logs").glob(pattern):
            if copy.is_dir() and not copy.is_symlink():
                shutil.rmtree(copy, ignore_errors=True)


def _differences(old: RunConfig, new: RunConfig) -> Iterator[str]:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section, value in after.items():
        if section not in RESUMABLE and value != before[section]:
            yield from _of_section(section, before[section], value)
        for key in FIXED.get(section, ()):
            if value[key] != before[section][key]:
                yield f"{section}.{key}: {_short(before[section][key])} there, {_short(value[key])} here"


def _of_section(section: str, before: Any, after: Any) -> Iterator[str]:
    """The keys that differ; a value that is no section is named whole."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        yield f"{section}: {_short(before)} there, {_short(after)} here"
        return
    for key in before | after:  # free mappings have keys of their own
        there, here = before.get(key), after.get(key)
        if there != here:
            yield from _of_section(f"{section}.{key}", there, here)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
