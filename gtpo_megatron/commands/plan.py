"""`gtpo-megatron plan`: arguments, and what is asked of the planner. `plan_tables` prints."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtpo_megatron.commands import plan_tables as tables
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import default_gpu, efficiency, find_gpu, published_shape

if TYPE_CHECKING:
    from gtpo_megatron.config import RunConfig
    from gtpo_megatron.plan.facts import GPU, Efficiency
    from gtpo_megatron.plan.layout import HFShape
    from gtpo_megatron.plan.search import Candidate
    from gtpo_megatron.scaling.calibrate import Calibration

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron plan recipes/large/llama-3.1-70b-math-bf16.yaml --gpus 64\n\n"
    "gtpo-megatron plan RECIPE.yaml --gpus 64 --search\n\n"
    "gtpo-megatron plan RECIPE.yaml --gpus 8 --up-to 1024 --plot scaling.png\n\n"
    "gtpo-megatron plan RECIPE.yaml --gpus 256 --calibrate runs/on-64\n\n"
    "gtpo-megatron plan --published FILE.csv"
)
MOST_GPUS = 1_000_000

PlannedRecipe = Annotated[
    Path | None, typer.Argument(help="Recipe file", metavar="RECIPE.yaml", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overlay files and overrides, as for train", metavar="OVERLAY.yaml|KEY=VALUE", show_default=False
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_GPUS,
        help="GPUs of the trainer. Default: the fewest that the layout takes.",
        show_default=False,
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        help=f"Kind of GPU (machines.yaml). Default: {default_gpu()}, or --calibrate's.", show_default=False
    ),
]
Lengths = Annotated[
    Path | None,
    typer.Option(
        help="Where completions' lengths come from: a run's directory, or a file with one number a line.",
        show_default=False,
    ),
]
Search = Annotated[bool, typer.Option("--search", help="Compare all layouts on --gpus; say why each loses.")]
UpTo = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_GPUS,
        help="The best layout on --gpus (default: 8), twice as many, and so on up to this many; what limits each.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Picture of --up-to.", metavar="FILE.png", show_default=False),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="Directory of a run whose measured rates replace those of machines.yaml. Without a recipe, its own.",
        metavar="RUN_DIR",
        show_default=False,
    ),
]
Published = Annotated[
    Path | None,
    typer.Option(
        help="Predict every row of a CSV file of published runs (docs/planner.md).", show_default=False
    ),
]


def plan(
    recipe: PlannedRecipe = None,
    settings: Overrides = None,
    gpus: Gpus = None,
    gpu: Kind = None,
    lengths: Lengths = None,
    search: Search = False,
    up_to: UpTo = None,
    plot: Plot = None,
    calibrate: Calibrate = None,
    published: Published = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a recipe's memory by part and a step's seconds by stage, before anything is started."""
    if published is not None:
        _alone(published, recipe, gpus, gpu, lengths, search, up_to, plot, calibrate)
        _published(published, as_json)
        return
    if recipe is None and calibrate is None:
        raise UserError("give a recipe, e.g. recipes/quickstart.yaml, or --published FILE.csv")
    if up_to is not None:
        gpus = 8 if gpus is None else gpus
    _agree(gpus, search, up_to, plot)
    calibration = None if calibrate is None else _calibration(calibrate)
    asked = _asked(recipe, settings or [], gpus, gpu, lengths, calibration)
    if calibration and not as_json:
        tables.print_calibration(calibration)
    if up_to is not None:
        _grown(asked, up_to, plot, as_json)
    elif search:
        _search(asked, as_json)
    else:
        _single(asked, calibration, as_json)


def _alone(published: Path, *others: object) -> None:
    if any(others):
        raise UserError(
            f"--published {published} predicts the rows of a file: give no recipe with it, and no other option than --json"
        )


def _agree(gpus: int | None, search: bool, up_to: int | None, plot: Path | None) -> None:
    if plot is not None and up_to is None:
        raise UserError("--plot is of --up-to: give it the largest number of GPUs, e.g. --up-to 1024")
    if up_to is not None and search:
        raise UserError("--up-to searches each number of GPUs: give no --search with it")
    if up_to is not None and gpus is not None and up_to < gpus:
        raise UserError(f"--up-to {up_to}: is below --gpus {gpus}, where it begins")


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


def _grown(asked: _Asked, last: int, plot: Path | None, as_json: bool) -> None:
    from gtpo_megatron.scaling import growth

    points = growth.grow(
        growth.doubled(asked.gpus, last),
        asked.config,
        asked.shape,
        asked.gpu,
        asked.lengths,
        asked.reached,
    )
    if as_json:
        rows = [
            (p.plan.as_dict() if p.plan else {"gpus": p.gpus, "fits": False}) | {"reason": p.reason}
            for p in points
        ]
        typer.echo(json.dumps(rows))
    else:
        tables.print_growth(points)
    if plot is not None:
        growth.plot({Path(asked.config.model.path).name: points}, plot)
        typer.echo(f"wrote {plot}", err=True)
    if not any(point.plan for point in points):
        raise UserError(
            f"nothing fits on {asked.gpus} to {last} GPUs; raise --up-to, or take GPUs with more memory (--gpu)"
        )


def _search(asked: _Asked, as_json: bool) -> None:
    from gtpo_megatron.plan.search import search, smallest_that_fits, splits

    candidates = search(*asked.arguments)
    if not candidates:
        raise UserError(f"--gpus {asked.gpus}: no layout stands on it; take a multiple of 8")
    shared = splits(*asked.arguments)
    if as_json:
        typer.echo(json.dumps({"layouts": _dicts(candidates), "splits": _dicts(shared)}))
    else:
        tables.print_search(candidates)
        tables.print_splits(shared, asked.gpus)
    if not candidates[0].plan.fits:
        raise UserError(tables.nothing_fits(asked.gpus, smallest_that_fits(*asked.arguments)))


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
        tables.print_plan(made)
    if not made.fits:
        nearest = search(*asked.arguments)[0].plan
        if not nearest.fits:
            nearest = smallest_that_fits(*asked.arguments)
        raise UserError(tables.does_not_fit(made, nearest))


def _calibration(run: Path, warmup: int = 2) -> "Calibration":
    from gtpo_megatron.scaling.calibrate import calibrate
    from gtpo_megatron.scaling.measured import measure

    return calibrate(measure(run, warmup), efficiency())


def _dicts(candidates: "list[Candidate]") -> list[dict[str, object]]:
    return [c.plan.as_dict() | {"reason": c.reason} for c in candidates]


def _published(path: Path, as_json: bool) -> None:
    from gtpo_megatron.plan.published import compare

    rows = compare(path)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        tables.print_published(rows)
