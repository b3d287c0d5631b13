"""`gtpo-megatron analyse`: arguments and printing."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gtpo_megatron.errors import UserError

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron analyse runs/quickstart --html report.html\n\n"
    "gtpo-megatron analyse runs/gtpo --against runs/grpo --html both.html\n\n"
    "gtpo-megatron analyse DUMP.parquet --tokenizer MODEL_DIR --json"
)


def analyse(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="A run's directory, or files or a directory of one dump of TRL, verl, NeMo-RL, open-instruct, prime-rl or slime.",
            metavar="PATH...",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained page for a browser.", metavar="FILE", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="On the page, another run or dump beside this one: the same prompts, side by side.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model's tokenizer: shows tokens as text; dumps of texts alone need it.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Load pickles (slime); they can run any code of whoever wrote them."),
    ] = False,
) -> None:
    """Show what GTPO does, or would do, with a run's completions: conflicts, protected and amplified tokens, signal, health."""
    from gtpo_megatron.analysis.analyse import analyse as run_analysis
    from gtpo_megatron.analysis.analyse import print_figures

    if against is not None and html is None:
        raise UserError("--against is for the page: add --html FILE")
    figures = run_analysis(paths, tokenizer=tokenizer, trust=trust, html=html, against=against)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        print_figures(figures, Console())
    if html is not None:
        typer.echo(str(html), err=as_json)
