"""`gtpo-megatron scaling-report`: arguments and printing."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron submit RECIPE.yaml --site mysite.yaml --scaling 1,2,4 training.steps=10\n\n"
    "gtpo-megatron scaling-report runs/NAME-strong-*"
)


def scaling_report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            help="Directories of runs of one recipe over several numbers of ranks",
            metavar="RUN_DIR...",
            show_default=False,
        ),
    ],
    warmup: Annotated[int, typer.Option(min=0, help="First steps of each run that do not count.")] = 2,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU of the plan beside it (machines.yaml), where the runs' own is not known.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where scaling.md and scaling.png go. Default: the first run's folder.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a recipe came to over numbers of nodes: seconds by stage, rates, efficiency, memory, beside the plan."""
    from gtpo_megatron.plan.facts import find_gpu
    from gtpo_megatron.scaling.report import measured_rows, planned_rows, to_json, write
    from gtpo_megatron.scaling.study import study

    made = study(run_dirs, warmup, find_gpu(gpu) if gpu else None)
    written = write(made, output or run_dirs[0].parent)
    if as_json:
        typer.echo(to_json(made))
        return
    console = Console(highlight=False, soft_wrap=True)
    for title, rows in ((f"{made.kind} scaling", measured_rows(made)), ("plan", None)):
        if rows is None and made.gpu is None:
            continue
        head, *body = rows or planned_rows(made)
        table = Table(head[0], *(row[0] for row in body), title=title)  # a column a run: there are few
        for name, *values in list(zip(head, *body, strict=True))[1:]:
            table.add_row(name, *values)
        console.print(table)
    typer.echo("\n".join(map(str, written)))
