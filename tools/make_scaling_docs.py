"""Write the table of docs/scaling.md and its plot: the fastest layout of four models on 8 to 1,024 H100, by the planner."""

import re
from pathlib import Path

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.estimate import Plan, completion_lengths
from gtpo_megatron.plan.facts import default_gpu, efficiency, find_gpu
from gtpo_megatron.plan.search import search

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
PLOT = ROOT / "docs" / "images" / "scaling.png"
RECIPE = ROOT / "recipes" / "large" / "llama-3.1-70b-math-bf16.yaml"
MODELS = ("Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "Llama-3.1-70B-Instruct", "Qwen3-30B-A3B")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
HEADER = (
    "| model | GPUs | tensor, pipeline, virtual, context, expert, recompute | GiB | training s | sampling s | step s "
    "| tokens/s/GPU training | MFU training | training limited by | step limited by |"
)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def row(model: str, gpus: int) -> str:
    """One line of the table; the batch is the recipe's, whatever the number of GPUs."""
    config = load_recipe(RECIPE, [f"model.path={ROOT / 'tests' / 'fixtures' / 'configs' / model}"])
    best = fastest(config, gpus)
    columns = HEADER.count("|") - 1
    if best is None:
        return f"| {model} | {gpus} | nothing fits |" + " |" * (columns - 3)
    return f"| {model} | {gpus} | " + " | ".join(cells(best)) + " |"


def fastest(config: RunConfig, gpus: int) -> Plan | None:
    """The first of a search that fits."""
    shape, lengths = read_shape(config.model.path), completion_lengths(config, None)
    try:
        found = search(config, shape, gpus, find_gpu(default_gpu()), lengths, efficiency())
    except UserError:  # no server stands on so few GPUs
        return None
    return next((candidate.plan for candidate in found if candidate.plan.fits), None)


def cells(plan: Plan) -> list[str]:
    """What is shown of a plan."""
    parallel, step, training = plan.parallel, plan.step, plan.step.training.total
    sizes = (
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline or 1,
        parallel.context,
        parallel.expert,
    )
    slower = "sampling" if (step.sampling or 0) > training + step.transfer else "training and transfer"
    return [
        f"{', '.join(map(str, sizes))}, {plan.recompute}",
        f"{plan.worst.total / 2**30:.0f}",
        f"{training:.1f}",
        f"{step.sampling:.0f}",
        f"{step.step:.0f}",
        f"{step.tokens / training / plan.gpus:.0f}",
        f"{step.flop_share:.0%}",
        step.training.limit,
        slower,
    ]


def updated(text: str) -> str:
    """The page with the table as the program gives it now."""
    rule = "|" + " --- |" * (HEADER.count("|") - 1)
    lines = [HEADER, rule, *(row(model, gpus) for model in MODELS for gpus in GPUS)]
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", text)


def series(text: str, column: str) -> dict[str, list[tuple[int, float]]]:
    """(GPUs, value) of a column of the page's table, by model; rows on which nothing fits are left out."""
    names = [name.strip() for name in HEADER.strip("| ").split("|")]
    found: dict[str, list[tuple[int, float]]] = {}
    for line in TABLE.search(text)[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if value := cells[names.index(column)]:
            found.setdefault(cells[0], []).append((int(cells[1]), float(value)))
    return found


def plot(text: str, path: Path) -> None:
    """Seconds of sampling and training, and training's tokens/s/GPU, over the number of GPUs, of the page's table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    seconds, rate = figure.subplots(1, 2)
    sampling = series(text, "sampling s")
    for color, model in zip(("C0", "C1", "C2", "C3"), MODELS, strict=True):
        training = series(text, "training s")[model]
        seconds.plot(*zip(*sampling[model], strict=True), color=color, marker="o", label=model)
        seconds.plot(*zip(*training, strict=True), color=color, marker="o", linestyle="--")
        points = series(text, "tokens/s/GPU training")[model]
        rate.plot(*zip(*points, strict=True), color=color, marker="o", label=model)
    seconds.set_ylabel("seconds: sampling (solid), training (dashed)")
    rate.set_ylabel("tokens/s/GPU while training")
    for axes in (seconds, rate):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.set_xlabel("trainer's GPUs (as many again sample)")
        axes.grid(alpha=0.3)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=len(MODELS))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plot(PAGE.read_text(encoding="utf-8"), PLOT)
