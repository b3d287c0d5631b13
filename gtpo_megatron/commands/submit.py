"""`gtpo-megatron submit`: arguments and printing."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gtpo_megatron.commands.arguments import Recipe, Settings
from gtpo_megatron.commands.imports import importing
from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError

if TYPE_CHECKING:
    from gtpo_megatron.cluster.site import Site
    from gtpo_megatron.cluster.submission import Job

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron submit RECIPE.yaml --site pyxis --nodes 16 training.steps=500\n\n"
    "gtpo-megatron submit RECIPE.yaml --site mysite.yaml --nodes 2 --dry-run\n\n"
    "gtpo-megatron submit RECIPE.yaml --site mysite.yaml --scaling 1,2,4 training.steps=10\n\n"
    "gtpo-megatron submit SWEEP.yaml --sweep --site mysite.yaml --nodes 2 --at-once 4"
)


def submit(
    recipe: Recipe,
    settings: Settings = None,
    site: Annotated[
        str, typer.Option(help="Facts of the cluster: a file, or a name in slurm/sites.", show_default=False)
    ] = ...,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train.", show_default=False)] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a node. Default: the site's.", show_default=False)
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit of a job. Default: the site's.", show_default=False)
    ] = None,
    servers: Annotated[
        int, typer.Option(min=0, help="More nodes, of the same job, that run SGLang servers.")
    ] = 0,
    het: Annotated[
        bool,
        typer.Option("--het", help="With --servers: their nodes are a component of their own of the job."),
    ] = False,
    servers_job: Annotated[
        int, typer.Option(min=0, help="Jobs of one node each that run SGLang servers, and may come and go.")
    ] = 0,
    spares: Annotated[
        int, typer.Option(min=0, help="More nodes, of the same job, that take the place of unfit ones.")
    ] = 0,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that the job is requeued without a new step.")
    ] = 3,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="RECIPE is a sweep file: a job array, an element a run.")
    ] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Runs of a sweep at a time. Default: all.", show_default=False)
    ] = None,
    scaling: Annotated[
        str | None,
        typer.Option(
            help="Instead of --nodes: a run for each of these numbers of nodes, for scaling-report. --servers and "
            "--servers-job are those of the smallest, and grow as it does.",
            metavar="NODES,NODES,...",
            show_default=False,
        ),
    ] = None,
    weak: Annotated[
        bool, typer.Option("--weak", help="With --scaling: the batch grows with the nodes.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and check the files; submit nothing.")
    ] = False,
) -> None:
    """Train on a Slurm cluster: writes the job's files into the run's directory, checks them, and submits.

    Paths in the recipe are as seen from the folder where you are.
    """
    from gtpo_megatron.cluster import submission
    from gtpo_megatron.cluster.site import load_site

    if (nodes is None) == (scaling is None):
        raise UserError("give --nodes, or --scaling with several numbers of nodes")
    if scaling and sweep or weak and not scaling:
        raise UserError("--scaling goes without --sweep, and --weak with --scaling alone")
    facts = load_site(site)
    gpus = facts.gpus_per_node if gpus_per_node is None else gpus_per_node
    in_container = facts.container.kind != "none"
    shape = submission.Job(
        name=recipe.stem,
        run=Path.cwd(),
        folder=Path.cwd(),
        nodes=nodes or 1,
        ranks_per_node=gpus_per_node or facts.ranks_per_node or gpus,
        gpus_per_node=gpus if facts.gpus_per_node else 0,
        time=time or facts.time,
        retries=retries,
        python=facts.python or ("python3" if in_container else sys.executable),
        servers=servers,
        het=het,
        servers_jobs=servers_job,
        spares=spares,
    )
    if spares and not facts.screening_s:
        raise UserError(
            f"--spares {spares}: they take the place of nodes that fail the screening, which {site} has turned off (screening_s: 0)"
        )
    if het and not servers:
        raise UserError("--het: the servers' nodes as a component of their own; say how many by --servers")
    words = settings or []
    if at_once and not sweep:
        raise UserError(
            "--at-once: how many runs of a sweep run at a time; it needs --sweep and a sweep file"
        )
    if sweep:
        _submit_sweep(recipe, words, shape, facts, at_once, dry_run)
        return
    if scaling:
        _submit_scaling(recipe, words, shape, facts, scaling, weak, dry_run)
        return
    config = _with_servers(recipe, words, shape)
    _submit(_write(config, shape, facts), config, shape, dry_run)


def _with_servers(recipe: Path, words: list[str], shape: "Job") -> RunConfig:
    """The recipe, told of the servers that are submitted with it."""
    from gtpo_megatron.cluster import submission
    from gtpo_megatron.config.loading import load_recipe

    config = load_recipe(recipe, words)
    if not (shape.servers or shape.servers_jobs):
        return config
    return load_recipe(recipe, [*words, *_servers_settings(config, submission.of_run(shape, config))])


def _submit(folder: Path, config: RunConfig, shape: "Job", dry_run: bool) -> str | None:
    """Queue a run; the number of its job, None of a dry run."""
    from gtpo_megatron.cluster import submission

    typer.echo(f"{shape.nodes} nodes x {shape.ranks_per_node} ranks: {folder / submission.SCRIPT}")
    if dry_run:
        for line in submission.commands(folder):
            typer.echo(shlex.join(line))
        return None
    jobs = submission.submit(folder)
    typer.echo(f"job {', '.join(jobs)}; where it is: gtpo-megatron status {config.path}")
    return jobs[0]


def _submit_scaling(
    recipe: Path, words: list[str], shape: "Job", site: "Site", sizes: str, weak: bool, dry_run: bool
) -> None:
    """A job for each number of nodes, all checked before the first is queued, and one that writes the report of them."""
    from gtpo_megatron.cluster import submission
    from gtpo_megatron.config.loading import load_recipe
    from gtpo_megatron.scaling.study import grown, node_counts, settings

    config, counts = load_recipe(recipe, words), node_counts(sizes)
    written = []
    for nodes in counts:
        servers, jobs = (grown(count, nodes, counts[0]) for count in (shape.servers, shape.servers_jobs))
        job = replace(shape, nodes=nodes, servers=servers, servers_jobs=jobs)
        own = settings(config, nodes, counts[0], "weak" if weak else "strong")
        sized = _with_servers(recipe, [*words, *own], job)
        afterwards = submission.AFTERWARDS if written else (*submission.AFTERWARDS, submission.REPORT)
        written.append((_write(sized, job, site, afterwards), sized, job))
    jobs = [_submit(folder, sized, job, dry_run) for folder, sized, job in written]
    smallest, *others = (Path(os.path.abspath(sized.path)) for _, sized, _ in written)
    if not dry_run:
        report = submission.submit_report(written[0][0], [job for job in jobs if job], others)
        typer.echo(f"job {report}, behind them: the report, in {smallest.parent}")
    typer.echo(f"at any time: gtpo-megatron scaling-report {shlex.join(map(str, [smallest, *others]))}")


def _write(config: RunConfig, shape: "Job", site: "Site", afterwards: Sequence[str] | None = None) -> Path:
    """Check the run against its directory and its nodes, and write the files of its submission."""
    from gtpo_megatron.cluster import submission
    from gtpo_megatron.config.loading import to_yaml
    from gtpo_megatron.run.identity import check_directory

    job = submission.of_run(shape, config)
    check_allocation(config, job, site.compute_capability)
    check_directory(config)
    return submission.write(job, site, to_yaml(config), afterwards or submission.AFTERWARDS)


def _submit_sweep(
    file: Path, words: list[str], shape: "Job", site: "Site", at_once: int | None, dry_run: bool
) -> None:
    """A job array of the runs of a sweep that are not complete yet."""
    from gtpo_megatron.cluster import submission
    from gtpo_megatron.sweep.design import load_sweep
    from gtpo_megatron.sweep.runner import is_complete

    if shape.servers or shape.servers_jobs:
        raise UserError(
            "--sweep with --servers or --servers-job: each run needs servers of its own; write the runs' recipes by "
            "`gtpo-megatron sweep SWEEP.yaml --write DIR`, and submit them one by one"
        )
    runs = [run for run in load_sweep(file, words) if not is_complete(run)]
    if not runs:
        typer.echo(f"{file}: all runs are complete")
        return
    folders = [_write(run.config, shape, site) for run in runs]
    job = replace(shape, run=Path(os.path.abspath(runs[0].config.path.parent / f"{file.stem}.sweep")))
    folder = submission.write_array(job, site, folders, at_once)
    for index, run in enumerate(runs):
        typer.echo(f"{index} {run.name}")
    if dry_run:
        typer.echo(shlex.join(*submission.commands(folder)))
        return
    array = submission.submit_array(folder, folders)
    typer.echo(
        f"job array {array}, logs in {job.run}; where a run is: gtpo-megatron status {runs[0].config.path}"
    )


def _servers_settings(config: RunConfig, job: "Job") -> list[str]:
    from gtpo_megatron.cluster.record import KEY_VARIABLE
    from gtpo_megatron.cluster.submission import servers_settings

    if job.servers and job.servers_jobs:
        raise UserError(
            "--servers and --servers-job: servers are in the run's job or in jobs of their own; give one of the two"
        )
    if config.rollout.engine != "sglang":
        raise UserError(
            f"--servers: SGLang servers, but rollout.engine is {config.rollout.engine}; set rollout.engine=sglang"
        )
    section = config.rollout.sglang
    found = servers_settings(job, section.tensor, section.servers)
    return found if section.api_key else [*found, f"rollout.sglang.api_key=env:{KEY_VARIABLE}"]


def check_allocation(config: RunConfig, job: "Job", capability: float) -> None:
    """The recipe against its checkpoint and the nodes that it is to get, which this machine need not be like."""
    from gtpo_megatron.machine.probe import Machine
    from gtpo_megatron.plan.checks import check_run

    gpu = bool(job.gpus_per_node)
    major, minor = str(capability).split(".")
    machine = Machine((int(major), int(minor)) if gpu else None, gpu, job.gpus_per_node, job.ranks_per_node)
    try:
        with importing():
            check_run(config, job.ranks, machine)
    except UserError as error:
        raise UserError(f"for {job.nodes} nodes x {job.ranks_per_node} ranks: {error}") from None
