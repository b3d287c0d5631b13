"""Arguments that several commands take."""

from glob import glob
from pathlib import Path
from typing import Annotated

import typer


def complete_setting(incomplete: str) -> list[str]:
    """Shell completion: dotted keys, YAML files, and folders on the way to one."""
    from gtpo_megatron.config.loading import known_keys

    keys = [f"{key}=" for key in known_keys() if key.startswith(incomplete)]
    return [*keys, *glob(f"{incomplete}*.yaml"), *glob(f"{incomplete}*/")]


Recipe = Annotated[
    Path,
    typer.Argument(
        help="Recipe file, e.g. recipes/quickstart.yaml", metavar="RECIPE.yaml", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overlay files and overrides, in any order: site.yaml optimizer.lr=2e-6 parallel.tensor=2",
        metavar="OVERLAY.yaml|KEY=VALUE",
        show_default=False,
        autocompletion=complete_setting,
    ),
]
