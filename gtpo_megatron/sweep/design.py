"""A sweep on paper: one recipe under every combination of the settings of some axes. Imports neither torch nor a model."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from gtpo_megatron.config.loading import YAML_SUFFIXES, load_file, load_recipe
from gtpo_megatron.config.run import RunConfig
from gtpo_megatron.config.section import Section
from gtpo_megatron.errors import UserError

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Sweep(Section):
    """A sweep file. Paths in it are as seen from the file's own folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="first part of the runs' names")
    recipe: str = Field(description="the recipe that all runs share")
    settings: tuple[str, ...] = Field((), description="overlays and key=value that all runs share")
    axes: dict[str, dict[str, tuple[str, ...]]] = Field(
        description="axis -> label -> the overlays and key=value of it; a run takes one label of every axis"
    )
    seeds: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="runs of each combination, training.seed = 0, 1, ...; default: the recipe's seed",
    )
    first_seed: int = Field(0, ge=0, le=1_000_000, description="the seed of the first of them")
    by_seed: bool = Field(
        False,
        description="all combinations at one seed, then at the next: what is done at any time is balanced",
    )

    @field_validator("axes")
    @classmethod
    def _labels(cls, axes: dict[str, dict[str, tuple[str, ...]]]) -> dict[str, dict[str, tuple[str, ...]]]:
        for axis, labels in axes.items():
            if not labels:
                raise ValueError(f"axis {axis} has no labels")
            if wrong := [label for label in labels if not LABEL.fullmatch(label)]:
                raise ValueError(
                    f"axis {axis}: label {wrong[0]!r} is part of a directory's name: letters, digits, . _ -"
                )
        return axes

    @model_validator(mode="after")
    def _name_is_ours(self) -> Self:
        every = [
            *self.settings,
            *(s for labels in self.axes.values() for one in labels.values() for s in one),
        ]
        for key in ("name", "training.seed"):
            if any(setting.startswith(f"{key}=") for setting in every):
                raise ValueError(f"{key} is set by the sweep itself, from labels and seeds")
        return self


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    name: str  # of the run, and of its directory
    labels: dict[str, str]  # axis -> label, and "seed"
    config: RunConfig


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> list[Planned]:
    """The runs of a sweep file in order, the last axis and then the seed changing fastest, or with `by_seed` the seed
    slowest; overrides go to all of them.

    Raises:
        UserError: a mistake in the file, or in the configuration that a combination gives, with the combination's name.
    """
    sweep = load_file(path, Sweep)
    folder = path.parent
    runs = []
    for combination, seed in _ordered(sweep):
        labels = {axis: label for axis, (label, _) in zip(sweep.axes, combination, strict=True)}
        own = [setting for _, settings in combination for setting in settings]
        seeded = {} if seed is None else {"seed": str(seed)}
        name = "-".join([sweep.name, *labels.values(), *(f"seed{value}" for value in seeded.values())])
        settings = _from_folder(folder, [*sweep.settings, *own])
        settings += [f"training.seed={value}" for value in seeded.values()]
        settings += [*overrides, f"name={name}"]
        try:
            config = load_recipe(folder / sweep.recipe, settings)
        except UserError as error:
            raise UserError(f"{path}: run {name}: {error}") from None
        runs.append(Planned(name, labels | seeded, config))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(
            f"{path}: two combinations of labels give one name; their labels must differ when joined by '-'"
        )
    return runs


Combination = tuple[tuple[str, tuple[str, ...]], ...]  # of each axis: label and settings


def _ordered(sweep: Sweep) -> Iterator[tuple[Combination, int | None]]:
    """Every combination with every seed, in the order in which they are to run."""
    combinations = list(itertools.product(*(labels.items() for labels in sweep.axes.values())))
    seeds = [None] if sweep.seeds is None else [sweep.first_seed + number for number in range(sweep.seeds)]
    if sweep.by_seed:
        return ((combination, seed) for seed in seeds for combination in combinations)
    return ((combination, seed) for combination in combinations for seed in seeds)


def _from_folder(folder: Path, settings: Sequence[str]) -> list[str]:
    """Overlays of the file, as seen from the folder where the program runs."""
    return [str(folder / s) if "=" not in s and s.endswith(YAML_SUFFIXES) else s for s in settings]
