"""`gtpo-megatron replay`: arguments and printing."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gtpo_megatron.commands.imports import importing

EPILOG = (
    "Examples:\n\ngtpo-megatron replay runs/quickstart --step 1\n\n"
    "gtpo-megatron replay runs/quickstart --step 12 --json > step-12.json   # for a bug report"
)


def replay(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory", metavar="RUN_DIR", show_default=False)],
    step: Annotated[int, typer.Option(min=1, help="The step, as in the metrics.", show_default=False)],
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Largest relative difference. Default: 1e-4, of a bf16 run 0.05.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON, a row a completion.")] = False,
) -> None:
    """Recompute a step of a run on this CPU in float64, without Megatron, and show how far what was recorded is from it.

    Exit code 0: within the tolerance; 1: beyond.
    """
    with importing():
        from gtpo_megatron.replay.replay import Replay
        from gtpo_megatron.replay.replay import replay as run_replay

    def show(found: Replay) -> None:
        table = Table(title=f"step {found.step}, {len(found.completions)} completions", title_justify="left")
        for name in ("figure", "recorded", "float64", "difference", "relative to", ""):
            table.add_column(name, justify="left" if name in ("figure", "") else "right")
        for check in found.checks:
            recorded = "not recorded" if check.recorded is None else f"{check.recorded:.8g}"
            difference = "" if check.difference is None else f"{check.difference:.1e}"
            verdict = (
                "beyond" if check.difference is not None and not check.difference <= found.tolerance else ""
            )
            where = f"{verdict} {check.at}".strip()
            table.add_row(
                check.name, recorded, f"{check.recomputed:.8g}", difference, f"{check.scale:.3g}", where
            )
        Console().print(table)
        for sentence in found.missing:
            typer.echo(f"not compared: {sentence}")
        typer.echo(f"{'within' if found.agrees else 'BEYOND'} the tolerance of {found.tolerance:g}")

    found = run_replay(run_dir, step, tolerance, say=lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
    raise typer.Exit(int(not found.agrees))
