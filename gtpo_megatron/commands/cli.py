"""The command line. Heavy imports stand inside the commands, so that --help and a mistyped key answer at once."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gtpo_megatron import __version__, vigil
from gtpo_megatron.cluster.pulse import give_pulse
from gtpo_megatron.cluster.ranks import in_step, join_step
from gtpo_megatron.commands.analyse import EPILOG as ANALYSE_EPILOG
from gtpo_megatron.commands.analyse import analyse
from gtpo_megatron.commands.arguments import Recipe, Settings
from gtpo_megatron.commands.compare import EPILOG as COMPARE_EPILOG
from gtpo_megatron.commands.compare import compare
from gtpo_megatron.commands.convert import convert_app
from gtpo_megatron.commands.evaluate import EPILOG as EVALUATE_EPILOG
from gtpo_megatron.commands.evaluate import evaluate
from gtpo_megatron.commands.imports import importing
from gtpo_megatron.commands.plan import EPILOG as PLAN_EPILOG
from gtpo_megatron.commands.plan import plan
from gtpo_megatron.commands.replay import EPILOG as REPLAY_EPILOG
from gtpo_megatron.commands.replay import replay
from gtpo_megatron.commands.scaling import EPILOG as SCALING_EPILOG
from gtpo_megatron.commands.scaling import scaling_report
from gtpo_megatron.commands.serve import EPILOG as SERVE_EPILOG
from gtpo_megatron.commands.serve import serve
from gtpo_megatron.commands.status import EPILOG as STATUS_EPILOG
from gtpo_megatron.commands.status import status
from gtpo_megatron.commands.submit import EPILOG as SUBMIT_EPILOG
from gtpo_megatron.commands.submit import submit
from gtpo_megatron.commands.sweep import EPILOG as SWEEP_EPILOG
from gtpo_megatron.commands.sweep import sweep
from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import MISTAKE, UserError
from gtpo_megatron.run.held_back import hold_back_stop
from gtpo_megatron.run.logs import quiet_libraries

app = typer.Typer(
    name="gtpo-megatron",
    help="GTPO on Megatron-Core: train, evaluate and inspect policies.\n\n"
    "A recipe is a YAML file; later YAML files overlay earlier ones, and key.path=value overrides come last.",
    epilog="First steps:\n\n"
    "gtpo-megatron doctor\n\n"
    "gtpo-megatron train recipes/quickstart.yaml\n\n"
    "gtpo-megatron --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(convert_app, name="convert")
app.command(epilog=ANALYSE_EPILOG)(analyse)
app.command(epilog=COMPARE_EPILOG)(compare)
app.command(epilog=EVALUATE_EPILOG)(evaluate)
app.command(epilog=PLAN_EPILOG)(plan)
app.command(epilog=REPLAY_EPILOG)(replay)
app.command(epilog=SCALING_EPILOG)(scaling_report)
app.command(epilog=SERVE_EPILOG)(serve)
app.command(epilog=STATUS_EPILOG)(status)
app.command(epilog=SUBMIT_EPILOG)(submit)
app.command(epilog=SWEEP_EPILOG)(sweep)

GRACE_S = 10.0  # how long other ranks let rank 0 speak first


@app.command(
    epilog="Examples:\n\n"
    "gtpo-megatron train recipes/quickstart.yaml training.seed=1\n\n"
    "gtpo-megatron train RECIPE.yaml SITE.yaml --dry-run --world-size 16\n\n"
    "torchrun --nproc-per-node 4 -m gtpo_megatron train RECIPE.yaml parallel.tensor=2"
)
def train(
    recipe: Recipe,
    settings: Settings = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check all, print the resolved configuration, rank layout and sizes; stop. "
            "Of the model config.json suffices; what was not there to be checked is named.",
        ),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks to lay out in a dry run. Default: torchrun's, else the fewest.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a policy (algorithm.name: gtpo, grpo or sft).

    Runs on this process alone, or on all ranks that torchrun starts.
    """
    from gtpo_megatron.plan.checks import check_run

    if world_size is not None and not dry_run:
        raise UserError(
            "--world-size is for --dry-run; a real run has the ranks that torchrun starts (--nproc-per-node)"
        )
    config = _load(recipe, settings)
    if dry_run:
        _dry_run(config, world_size)
        return
    if in_step(os.environ):
        hold_back_stop()
    with importing():
        check_run(config, _env_world_size() or 1)  # a mistake is said before the larger part is loaded
        from gtpo_megatron import rollcall
        from gtpo_megatron.train import train as run_training

    # not before: loading torch's libraries from a slow file system may keep Python still for minutes
    give_pulse(os.environ)
    vigil.watch(config.training.stuck_after_s, lost=rollcall.missing)

    raise typer.Exit(run_training(config))


@app.command(
    epilog="Examples:\n\n"
    "gtpo-megatron report runs/quickstart\n\n"
    "gtpo-megatron report runs/gtpo-seed* runs/grpo-seed* --output runs/gtpo-grpo"
)
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            help="Directories of runs: <dir>/<name> of their recipes",
            metavar="RUN_DIR...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Of several runs: where comparison.md and comparison.png go. Default: the first run's folder.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Summarise a run: a table here, summary.md and report.png in its directory. Several runs are compared.

    Of several runs metrics are overlaid in one plot and table; the seeds of one recipe are shown as mean and band.
    """
    if len(run_dirs) > 1:
        from gtpo_megatron.analysis.recipes import compare_runs

        written = compare_runs(run_dirs, output or run_dirs[0].parent)
        typer.echo(f"{written}\n{written.with_suffix('.png')}")
        return
    if output is not None:
        raise UserError("--output is for several runs; one run's report goes into its own directory")
    (run_dir,) = run_dirs
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: no metrics.jsonl there; give a run's directory, e.g. runs/quickstart")
    from gtpo_megatron.analysis.report import write_report

    write_report(run_dir)


@app.command(name="verify-resume", epilog="Example: gtpo-megatron verify-resume runs/quickstart")
def verify_resume(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory", metavar="RUN_DIR", show_default=False)],
    steps: Annotated[int, typer.Option(min=2, help="Steps of the short copy.")] = 3,
) -> None:
    """Show on a short copy of a run that an interrupted training goes on to the same metrics. Exit code 1 if not."""
    from gtpo_megatron.run.verify_resume import verify_resume as verify

    report = verify(run_dir, steps=steps)
    typer.echo(report.summary())
    raise typer.Exit(int(not report.exact))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine has and can do, and what to install. Exit code 1 if something is broken."""
    from gtpo_megatron.machine.doctor import examine, print_findings

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        print_findings(findings, Console())
    raise typer.Exit(int(any(finding.status == "error" for finding in findings)))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a UserError becomes one message on standard error and exit code 2."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # a recipe's own functions import alike from the script and from `python -m`
    quiet_libraries()
    try:
        join_step(os.environ)
        app(args=arguments)
    except UserError as error:
        if os.environ.get("GTPO_TRACEBACK") == "1":
            raise
        _say(error)
        sys.exit(MISTAKE)


def _say(error: UserError) -> None:
    """Print the message once: rank 0 at once, another rank only if the launcher has not ended it a while later.

    All ranks usually meet the same error. An error of one rank alone must not go unsaid, and a rank that exits before
    rank 0 has spoken makes torchrun end rank 0.
    """
    rank = _rank()
    if rank:
        time.sleep(GRACE_S)
    print(f"gtpo-megatron: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


def _load(recipe: Path, settings: Sequence[str] | None) -> RunConfig:
    from gtpo_megatron.config.loading import load_recipe

    return load_recipe(recipe, settings or [])


def _dry_run(config: RunConfig, world_size: int | None) -> None:
    from gtpo_megatron.config.loading import to_yaml
    from gtpo_megatron.plan.absent import absent_parts
    from gtpo_megatron.plan.checks import check_run
    from gtpo_megatron.plan.layout import smallest_world
    from gtpo_megatron.plan.table import print_layout

    world = world_size or _env_world_size() or smallest_world(config.parallel)
    absent = absent_parts(config)
    with importing():
        shape = check_run(config, world, without=absent)
    if _rank() == 0:
        typer.echo(to_yaml(config))
        print_layout(config, shape, world, Console())
        for sentence in absent.values():  # nothing may look checked that was not
            typer.echo(f"not checked: {sentence}")


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _env_world_size() -> int | None:
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
