"""`gtpo-megatron compare`: arguments and printing."""

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: gtpo-megatron compare runs/x/evaluations/before runs/x/evaluations/after"


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
) -> None:
    """Compare two evaluations: differences paired by prompt with their 95% intervals, and the prompts that changed."""
    from gtpo_megatron.evaluation.compare import as_text
    from gtpo_megatron.evaluation.compare import compare as run_comparison

    found = run_comparison(first, second)
    typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))
