"""`gtpo-megatron status`: arguments and printing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gtpo_megatron.cluster.status import Picture, look, seconds

EPILOG = "Example: gtpo-megatron status runs/quickstart"
ATTEMPTS_SHOWN = 5
HOW = {
    "0": "complete",
    "2": "mistake",
    "3": "stopped",
    "4": "stuck",
    "term": "ended by Slurm",
    "hung": "a rank hung",
    "unfit": "a node was unfit",
}


def status(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory", metavar="RUN_DIR", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show where a run is: state, step, stage, jobs, newest checkpoint, what would be lost if it were killed now."""
    picture = look(run_dir)
    if as_json:
        typer.echo(json.dumps(picture.as_dict(), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, text in lines(picture):
        console.print(f"{name:<12}{text}", markup=False)


def lines(picture: Picture) -> Iterator[tuple[str, str]]:
    """What is shown: a name and a text a line."""
    yield "run", picture.run
    yield "state", picture.state
    if (status := picture.status) is not None:
        if status.message:
            yield "error", status.message
        yield "step", f"{status.step} of {status.steps}"
        if status.stage:
            yield "stage", f"{status.stage}, for {_span(picture.time - status.stage_since)}"
        yield (
            "heartbeat",
            f"{_span(picture.time - status.heartbeat)} ago, process {status.pid} on {status.host}",
        )
        if status.checkpoint_step is None:
            yield "checkpoint", "none yet"
        else:
            ago = _span(picture.time - (status.checkpoint_time or picture.time))
            yield "checkpoint", f"of step {status.checkpoint_step}, {ago} ago"
        if status.exit_code is None:
            yield "at risk", f"{picture.at_risk} steps if it were killed now"
    if picture.lease is not None:
        yield "owner", str(picture.lease)
    for job in picture.jobs:
        where = f"on {job.nodes}, {job.time_left} left" if job.nodes else f"({job.reason})"
        yield "job", f"{job.job_id} {job.state.lower()} {where}"
    for job in picture.servers_jobs:
        yield (
            "servers",
            f"job {job.job_id} {job.state.lower()} {f'on {job.nodes}' if job.nodes else f'({job.reason})'}",
        )
    for server in picture.servers:
        yield "server", f"{server.url}, up for {_span(picture.time - server.since)}"
    for attempt in picture.attempts[-ATTEMPTS_SHOWN:]:
        how = HOW.get(attempt.how, f"failed with {attempt.how}")
        yield "attempt", f"{attempt.number}: job {attempt.job_id}, {how} at step {attempt.step}"
    if stages := seconds(picture.last):
        shown = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
        yield "seconds", f"{shown} (step {picture.last['step']})"
    for problem in picture.problems:
        yield "note", problem


def _span(seconds: float) -> str:
    """12 s, 3 min, 5 h, 2 d"""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
