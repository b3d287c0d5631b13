"""`gtpo-megatron compare`: arguments and printing."""

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: gtpo-megatron compare runs/x/evaluations/before runs/x/evaluations/after --plot change.png"


def compare(
    first: Annotated[
        Path,
        typer.Argument(
            help="An evaluation's directory, or its evaluation.json", metavar="A", show_default=False
        ),
    ],
    second: Annotated[
        Path, typer.Argument(help="Another, of the same suites", metavar="B", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw pass@k and maj@k of both over k.", metavar="FILE.png", show_default=False),
    ] = None,
) -> None:
    """Compare two evaluations: differences paired by prompt with their 95% intervals, and the prompts that changed."""
    from gtpo_megatron.evaluation import compare as comparison

    found = comparison.compare(first, second)
    if plot is not None:
        comparison.plot(plot, found)
    typer.echo(json.dumps(found, indent=2) if as_json else comparison.as_text(found))
