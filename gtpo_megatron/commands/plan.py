"""`gtpo-megatron plan`: arguments and printing."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import default_gpu, efficiency, find_gpu, published_shape

if TYPE_CHECKING:
    from gtpo_megatron.config import RunConfig
    from gtpo_megatron.plan.estimate import Plan
    from gtpo_megatron.plan.facts import GPU, Efficiency
    from gtpo_megatron.plan.layout import HFShape
    from gtpo_megatron.plan.search import Candidate
    from gtpo_megatron.scaling.calibrate import Calibration

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron plan recipes/large/llama-3.1-70b-math-bf16.yaml --gpus 64\n\n"
    "gtpo-megatron plan RECIPE.yaml --gpus 64 --search\n\n"
    "gtpo-megatron plan RECIPE.yaml --gpus 256 --calibrate runs/on-64\n\n"
    "gtpo-megatron plan --published FILE.csv"
)
SHOWN = 10  # layouts of a search that are printed, and of those that do not fit
GIB = 2**30


def plan(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe file", metavar="RECIPE.yaml", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Overlay files and overrides, as for train",
            metavar="OVERLAY.yaml|KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="GPUs of the trainer. Default: the fewest that the layout takes.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"Kind of GPU (machines.yaml). Default: {default_gpu()}, or --calibrate's.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="Where completions' lengths come from: a run's directory, or a file with one number a line.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Compare all layouts on --gpus; say why each loses.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a run whose measured rates replace those of machines.yaml. Without a recipe, its own.",
            metavar="RUN_DIR",
            show_default=False,
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="Predict every row of a CSV file of published runs (docs/planner.md).", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a recipe's memory by part and a step's seconds by stage, before anything is started."""
    if published is not None:
        if recipe is not None or calibrate is not None:
            raise UserError(
                "--published predicts the rows of a file: give no recipe with it, nor --calibrate"
            )
        _published(published, as_json)
        return
    if recipe is None and calibrate is None:
        raise UserError("give a recipe, e.g. recipes/quickstart.yaml, or --published FILE.csv")
    calibration = None if calibrate is None else _calibration(calibrate)
    asked = _asked(recipe, settings or [], gpus, gpu, lengths, calibration)
    if calibration and not as_json:
        _print_calibration(calibration)
    if search:
        _search(asked, as_json)
    else:
        _single(asked, calibration, as_json)


@dataclass(frozen=True)
class _Asked:
    """What is to be planned, and with which rates."""

    config: "RunConfig"
    shape: "HFShape"
    gpus: int
    gpu: "GPU"
    lengths: list[float]
    reached: "Efficiency"

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.config, self.shape, self.gpus, self.gpu, self.lengths, self.reached


def _asked(
    recipe: Path | None,
    settings: list[str],
    gpus: int | None,
    kind: str | None,
    source: Path | None,
    calibration: "Calibration | None",
) -> _Asked:
    from gtpo_megatron.config.loading import load_recipe
    from gtpo_megatron.plan.estimate import completion_lengths
    from gtpo_megatron.plan.layout import smallest_world

    measured = calibration and calibration.measured
    reached = calibration.efficiency if calibration else efficiency()
    gpu = measured.facts.gpu if measured and not kind else find_gpu(kind or default_gpu())
    if recipe is None:  # the run's own, whose model need not be here
        config, shape = load_recipe(measured.run / "config.yaml", settings), measured.facts.shape
        gpus = gpus or measured.ranks
        source = source or (measured.run if measured.generated is not None else None)
    else:
        config = load_recipe(recipe, settings)
        shape = _shape(config.model.path)
    gpus = gpus or smallest_world(config.parallel)
    if config.model.fp8.enabled and gpu.fp8 is None:
        raise UserError(f"model.fp8: {config.model.fp8.format}: {gpu.name} has no FP8; set model.fp8=none")
    return _Asked(config, shape, gpus, gpu, completion_lengths(config, source), reached)


def _shape(path: str) -> "HFShape":
    from gtpo_megatron.plan.checks import read_shape

    shape = None if Path(path).is_dir() else published_shape(path)
    if shape is None:
        return read_shape(path)
    typer.echo(f"model.path: {path}: a hub name; its published shape is taken (models.yaml)", err=True)
    return shape


def _search(asked: _Asked, as_json: bool) -> None:
    from gtpo_megatron.plan.search import search, smallest_that_fits, splits

    candidates = search(*asked.arguments)
    if not candidates:
        raise UserError(f"--gpus {asked.gpus}: no layout stands on it; take a multiple of 8")
    shared = splits(*asked.arguments)
    if as_json:
        typer.echo(json.dumps({"layouts": _dicts(candidates), "splits": _dicts(shared)}))
    else:
        _print_search(candidates, _console())
        _print_splits(shared, asked.gpus, _console())
    if not candidates[0].plan.fits:
        raise UserError(_nothing_fits(asked.gpus, smallest_that_fits(*asked.arguments)))


def _single(asked: _Asked, calibration: "Calibration | None", as_json: bool) -> None:
    from gtpo_megatron.plan.estimate import check_layout, make_plan
    from gtpo_megatron.plan.search import search, smallest_that_fits

    check_layout(asked.config, asked.shape, asked.gpus)
    made = make_plan(*asked.arguments)
    if calibration:
        made = replace(made, uncertainty=calibration.uncertainty(made))
    if as_json:
        said = {"calibration": calibration.as_dict()} if calibration else {}
        typer.echo(json.dumps(made.as_dict() | said))
    else:
        _print_plan(made, _console())
    if not made.fits:
        nearest = search(*asked.arguments)[0].plan
        if not nearest.fits:
            nearest = smallest_that_fits(*asked.arguments)
        raise UserError(_does_not_fit(made, nearest))


def _calibration(run: Path, warmup: int = 2) -> "Calibration":
    from gtpo_megatron.scaling.calibrate import calibrate
    from gtpo_megatron.scaling.measured import measure

    return calibrate(measure(run, warmup), efficiency())


def _print_calibration(made: "Calibration") -> None:
    m = made.measured
    table = Table("factor", "machines.yaml", "measured", "from", title=f"calibrated by {m.run}")
    for change in made.changes:
        table.add_row(change.name, f"{change.before:.4g}", f"{change.after:.4g}", change.measured)
    console = _console()
    console.print(table)
    for name in made.kept:
        console.print(f"as before: {name}")
    console.print(
        f"{m.steps} steps on {m.ranks} {m.facts.device}; training ± {made.spread:.1%} of this layout on as many GPUs, "
        "of others as far off as without calibration"
    )


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=max(140, Console().width))


def _dicts(candidates: "list[Candidate]") -> list[dict[str, object]]:
    return [c.plan.as_dict() | {"reason": c.reason} for c in candidates]


def _nothing_fits(gpus: int, larger: "Plan | None") -> str:
    if larger is None:
        return f"no layout fits on {gpus} GPUs, nor on twice as many and so on; take GPUs with more memory (--gpu)"
    return f"no layout fits on {gpus} GPUs; nearest that works: --gpus {larger.gpus}, {layout_name(larger)}"


def _does_not_fit(made: "Plan", nearest: "Plan | None") -> str:
    worst = made.worst
    text = (
        f"does not fit: {worst.total / GIB:.1f} GiB ± {made.uncertainty['memory']:.0%} on a GPU of stage {worst.stage}, "
        f"{made.gpu.name} has {made.gpu.memory / GIB:.1f} GiB"
    )
    if nearest is None or nearest.gpus != made.gpus:
        return f"{text}; {_nothing_fits(made.gpus, nearest)}"
    return f"{text}; the fastest that does on {made.gpus} GPUs: {layout_name(nearest)}"


def layout_name(made: "Plan") -> str:
    """The overrides that ask for a plan's layout."""
    parallel = made.parallel
    words = [
        f"parallel.{key}={getattr(parallel, key)}" for key in ("tensor", "pipeline", "context", "expert")
    ]
    words.append(
        f"parallel.virtual_pipeline={parallel.virtual_pipeline if parallel.virtual_pipeline else 'null'}"
    )
    words.append(f"parallel.sequence={str(parallel.sequence).lower()}")
    return " ".join([*words, f"training.recompute={made.recompute}"])


def _print_plan(made: "Plan", console: Console) -> None:
    worst, step, unsure = made.worst, made.step, made.uncertainty
    memory = Table(
        f"GiB on a GPU of stage {worst.stage}", f"of {made.gpu.memory / GIB:.1f} ({made.gpu.name})"
    )
    for name, value in worst.parts.items():
        memory.add_row(name, f"{value / GIB:.2f}")
    memory.add_row("total", f"{worst.total / GIB:.2f} ± {unsure['memory']:.0%}")
    if made.host_memory:
        memory.add_row("host memory of a node, for Adam", f"{made.host_memory / GIB:.0f}")
    console.print(memory)
    seconds = Table("seconds of a step", f"± {unsure['step']:.0%}; training ± {unsure['training']:.0%}")
    sampled = "none, or not modelled" if step.sampling is None else f"{step.sampling:.3g}"
    seconds.add_row("sampling", sampled)
    seconds.add_row("scoring", f"{step.scoring:.3g}")
    seconds.add_row("training", f"{step.training.total:.3g}")
    for name, value in vars(step.training).items():
        seconds.add_row(f"  {name}", f"{value:.3g}")
    seconds.add_row("weight transfer", f"{step.transfer:.3g}")
    seconds.add_row("step" if step.sampling is not None else "step without sampling", f"{step.step:.3g}")
    seconds.add_row("a checkpoint, beside the step", f"{step.checkpoint:.3g}")
    console.print(seconds)
    servers = ""
    if (server := made.server) is not None:
        servers = (
            f", {made.servers} servers of {server.tensor} sample (on each: weights {server.weights / GIB:.1f} GiB, "
            f"cache {server.cache / GIB:.1f} GiB for {server.cached_tokens:,.0f} tokens)"
        )
    console.print(
        f"trainer's GPUs: {made.gpus}{servers}; "
        f"{step.tokens:,.0f} tokens a step, MFU while training {step.flop_share:.0%}, limited by {step.training.limit}"
    )


def _print_search(candidates: "list[Candidate]", console: Console) -> None:
    fitting = [c for c in candidates if c.plan.fits]
    rest = [c for c in candidates if not c.plan.fits]
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    table = Table(
        *("tensor", "pipeline", "virtual", "context", "expert", "recompute"),
        *("GiB", "training s", "step s", "why not"),
    )
    for candidate in [*fitting[:SHOWN], *rest[:SHOWN]]:
        made = candidate.plan
        table.add_row(
            *(str(getattr(made.parallel, name) or "-") for name in names),
            made.recompute,
            f"{made.worst.total / GIB:.1f}",
            f"{made.step.training.total:.2f}",
            f"{made.step.step:.2f}",
            candidate.reason or "the fastest that fits",
        )
    console.print(table)
    console.print(f"{len(fitting)} layouts fit, {len(rest)} do not; --json has them all")
    if fitting:
        console.print(f"the first as overrides: {layout_name(fitting[0].plan)}")


def _print_splits(shared: "list[Candidate]", gpus: int, console: Console) -> None:
    if not shared:
        return
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    table = Table(
        *("trainer's GPUs", "servers", *(name.partition("_")[0] for name in names), "recompute"),
        *("training s", "sampling s", "step s", "why not"),
        title=f"{gpus} GPUs for trainer and servers together",
    )
    for candidate in shared:
        made = candidate.plan
        assert made.server is not None
        table.add_row(
            str(made.gpus),
            f"{made.servers} of {made.server.tensor}",
            *(str(getattr(made.parallel, name) or "-") for name in names),
            made.recompute,
            f"{made.step.training.total:.2f}",
            f"{made.step.sampling:.1f}",
            f"{made.step.step:.1f}",
            candidate.reason or "the best",
        )
    console.print(table)


def _published(path: Path, as_json: bool) -> None:
    from gtpo_megatron.plan.published import compare

    rows = compare(path)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=2))
        return
    table = Table("id", "kind", "predicted", "published", "error", "unit")
    for row in rows:
        if row.reason:
            table.add_row(row.id, row.kind, "-", f"{row.published}", "-", row.reason)
        else:
            table.add_row(
                row.id,
                row.kind,
                f"{row.predicted:,.1f} ± {row.uncertainty:.0%}",
                f"{row.published:g}",
                f"{row.error:+.1%}",
                row.unit,
            )
    Console(width=200).print(table)
