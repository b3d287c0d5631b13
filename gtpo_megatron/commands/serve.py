"""`gtpo-megatron serve`: arguments."""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from gtpo_megatron.commands.arguments import Recipe, Settings
from gtpo_megatron.commands.imports import importing

EPILOG = "Example: gtpo-megatron serve RECIPE.yaml rollout.sglang.urls_dir=runs/x/servers rollout.sglang.api_key=env:KEY"


def serve(
    recipe: Recipe,
    settings: Settings = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="By which the trainer reaches this machine. Default: its name.", show_default=False
        ),
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(help="Folder for the servers' logs. Default: the run's.", show_default=False),
    ] = None,
) -> None:
    """Start SGLang servers here for a run that goes on elsewhere; they register in rollout.sglang.urls_dir.

    The trainer takes them in as they come, and lets them go as they leave. SIGTERM ends them, and so does the end of the run.
    """
    from gtpo_megatron.config.loading import load_recipe
    from gtpo_megatron.machine.probe import this_machine
    from gtpo_megatron.run.logs import logging_to

    with importing():
        from gtpo_megatron.run.serve import serve as keep

    config = load_recipe(recipe, settings or [])
    host = host or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    folder = (logs or config.path / "logs") / host
    folder.mkdir(parents=True, exist_ok=True)
    with logging_to(folder / "serve.log"):
        code = keep(config, host, "cuda" if this_machine().gpus else "cpu", folder)
    raise typer.Exit(code)
