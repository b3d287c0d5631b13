"""`gtpo-megatron sweep`: arguments and printing."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gtpo_megatron.errors import COMPLETE, FAILED, STOPPED, UserError

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron sweep recipes/sweeps/paper-ablations.yaml --list\n\n"
    "gtpo-megatron sweep SWEEP.yaml --jobs 2 training.steps=100\n\n"
    "gtpo-megatron sweep SWEEP.yaml --index 3   # one run: what a job of an array starts\n\n"
    "gtpo-megatron sweep SWEEP.yaml --write recipes/mine   # recipes for submit or torchrun"
)


def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file", metavar="SWEEP.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="For all runs", metavar="KEY=VALUE", show_default=False)
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Show the runs, and start none.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a process each.")] = 1,
    index: Annotated[
        int | None, typer.Option(help="Only the run of this number.", show_default=False)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the recipes there, one file a run, and start none.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only runs whose name contains this, or one of several.", show_default=False),
    ] = None,
) -> None:
    """Train a recipe under every combination of a sweep file's settings. Complete runs are left alone, others go on.

    Exit code 0: all complete; 3: stopped, the same command goes on; 1: some failed.
    """
    from gtpo_megatron.config.loading import save_config
    from gtpo_megatron.sweep.design import load_sweep
    from gtpo_megatron.sweep.runner import Runner, is_complete

    runs = load_sweep(file, overrides or [])
    if index is not None and not 0 <= index < len(runs):
        raise UserError(f"--index {index}: {file} has {len(runs)} runs, 0 to {len(runs) - 1}")
    chosen = [
        (number, run)
        for number, run in enumerate(runs)
        if any(part in run.name for part in only or [""]) and index in (None, number)
    ]
    if not chosen:
        raise UserError(
            f"--only {' '.join(only or [])}: no run of {file} has this in its name; --list shows them"
        )
    if list_runs:
        table = Table("", "run", *runs[0].labels, "complete")
        for number, run in chosen:
            table.add_row(str(number), run.name, *run.labels.values(), "yes" if is_complete(run) else "")
        Console().print(table)
        return
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for _, run in chosen:
            save_config(run.config, write / f"{run.name}.yaml")
            typer.echo(write / f"{run.name}.yaml")
        return
    codes = Runner(lambda text: typer.echo(text)).run([run for _, run in chosen], jobs)
    if all(codes.get(run.name) == COMPLETE for _, run in chosen):
        raise typer.Exit(COMPLETE)
    failed = [name for name, code in codes.items() if code not in (COMPLETE, STOPPED)]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
    raise typer.Exit(FAILED if failed else STOPPED)
