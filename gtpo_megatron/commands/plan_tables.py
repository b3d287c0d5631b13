"""What `gtpo-megatron plan` prints: a plan's parts, a search, numbers of GPUs, published rows, and what is said where nothing fits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gtpo_megatron.plan.estimate import Plan
    from gtpo_megatron.plan.published import Comparison
    from gtpo_megatron.plan.search import Candidate
    from gtpo_megatron.scaling.calibrate import Calibration
    from gtpo_megatron.scaling.growth import Point

SHOWN = 10  # layouts of a search that are printed, and of those that do not fit
GIB = 2**30
SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
PARTS = {  # of memory, where a word says too little
    "head": "loss head's workspace",
    "buckets": "buckets of weights for the servers",
    "runtime": "CUDA, kernels, NCCL's buffers",
    "server": "a server that sleeps",
}


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=max(160, Console().width))


def print_plan(made: "Plan") -> None:
    """Memory by part, seconds by stage, what is sent, and the servers."""
    console = _console()
    console.print(_memory(made))
    console.print(_seconds(made))
    if made.collectives:
        console.print(_communication(made))
    if made.server is not None:
        console.print(_server(made))
    step = made.step
    limits = f"training by {step.training.limit}" + (f", a step by {step.limit}" if step.sampling else "")
    console.print(
        f"trainer's GPUs: {made.gpus}; {step.tokens:,.0f} tokens a step, MFU while training {step.flop_share:.0%}; limited: {limits}"
    )


def _memory(made: "Plan") -> Table:
    worst = made.worst
    table = Table(f"GiB on a GPU of stage {worst.stage}", f"of {made.gpu.memory / GIB:.1f} ({made.gpu.name})")
    for name, value in worst.parts.items():
        table.add_row(PARTS.get(name, name), f"{value / GIB:.2f}")
    table.add_row("total", f"{worst.total / GIB:.2f} ± {made.uncertainty['memory']:.0%}")
    for turn, value in made.turns.items():
        table.add_row(f"in the turn {turn}, server included", f"{value / GIB:.2f}")
    if made.host_memory:
        table.add_row("host memory of a node, for Adam", f"{made.host_memory / GIB:.0f}")
    return table


def _seconds(made: "Plan") -> Table:
    step, unsure = made.step, made.uncertainty
    table = Table("seconds of a step", f"± {unsure['step']:.0%}; training ± {unsure['training']:.0%}")
    sampled = step.sampling is not None
    table.add_row("sampling", f"{step.sampling:.3g}" if sampled else "none, or not modelled")
    table.add_row("scoring", f"{step.scoring:.3g}")
    table.add_row("training", f"{step.training.total:.3g}")
    for name, value in vars(step.training).items():
        if value:
            table.add_row(f"  {name}", f"{value:.3g}")
    table.add_row("weight transfer", f"{step.transfer:.3g}")
    if step.turns:
        table.add_row("memory in turn with servers", f"{step.turns:.3g}")
    table.add_row("rewards, packing, logging", f"{step.overhead:.3g}")
    whole = "step without sampling"
    if sampled:
        whole = "step (sampling runs beside the rest)" if step.overlapped else "step"
    table.add_row(whole, f"{step.step:.3g}")
    table.add_row("a checkpoint, beside the step", f"{step.checkpoint:.3g}")
    return table


def _communication(made: "Plan") -> Table:
    table = Table("a rank sends in a step, over", "ranks", "by", "GiB")
    for c in made.collectives:
        table.add_row(c.group, str(c.ranks), f"{c.kind.replace('_', '-')}, {c.dtype}", f"{c.sent / GIB:.3g}")
    return table


def _server(made: "Plan") -> Table:
    server = made.server
    assert server is not None
    left = server.gpu.memory - server.weights - server.cache
    table = Table(f"{made.servers} servers of {server.tensor}", "GiB on a GPU")
    table.add_row("weights", f"{server.weights / GIB:.1f}")
    table.add_row(f"KV cache, {server.cached_tokens:,.0f} tokens", f"{server.cache / GIB:.1f}")
    table.add_row("left", f"{left / GIB:.1f}")
    return table


def print_calibration(made: "Calibration") -> None:
    """What was replaced, by what, and what stayed."""
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


def print_growth(points: "Sequence[Point]") -> None:
    """The fastest layout of each number of GPUs."""
    from gtpo_megatron.scaling.growth import layout_words, training_rate

    table = Table(
        *(
            "GPUs",
            "tensor, pipeline, virtual, context, expert, recompute",
            "GiB",
            "training s",
            "sampling s",
            "step s",
        ),
        *("tokens/s/GPU training", "MFU", "training limited by", "step limited by"),
    )
    for point in points:
        if point.plan is None:
            table.add_row(str(point.gpus), "nothing fits")
            continue
        plan, step = point.plan, point.plan.step
        table.add_row(
            *(str(point.gpus), layout_words(plan), f"{plan.worst.total / GIB:.0f}"),
            f"{step.training.total:.2f}",
            "-" if step.sampling is None else f"{step.sampling:.1f}",
            *(f"{step.step:.1f}", f"{training_rate(plan):.0f}", f"{step.flop_share:.0%}"),
            *(step.training.limit, step.limit),
        )
    console = _console()
    console.print(table)
    for point in points:
        if point.plan is None:
            console.print(f"nothing fits on {point.gpus}: {point.reason}")
    fitting = [point.plan for point in points if point.plan is not None]
    if fitting:
        console.print(f"the batch stays as it is; {_uncertainty(fitting[0])}")


def print_search(candidates: "list[Candidate]") -> None:
    """The best that fit and the nearest that do not, each with the reason."""
    fitting = [c for c in candidates if c.plan.fits]
    rest = [c for c in candidates if not c.plan.fits]
    table = Table(
        *(name.partition("_")[0] for name in SIZES),
        *("recompute", "GiB", "training s", "step s", "why not"),
    )
    for candidate in [*fitting[:SHOWN], *rest[:SHOWN]]:
        made = candidate.plan
        table.add_row(
            *_sizes(made),
            f"{made.worst.total / GIB:.1f}",
            f"{made.step.training.total:.2f}",
            f"{made.step.step:.2f}",
            candidate.reason or "the fastest that fits",
        )
    console = _console()
    console.print(table)
    first = candidates[0].plan
    console.print(
        f"{len(fitting)} layouts fit, {len(rest)} do not (GiB and {first.uncertainty['memory']:.0%} more are to be below "
        f"{first.gpu.memory / GIB:.1f}); --json has them all; {_uncertainty(first)}"
    )
    if fitting:
        console.print(f"the first as overrides: {layout_name(fitting[0].plan)}")


def print_splits(shared: "list[Candidate]", gpus: int) -> None:
    """Trainer and servers on the GPUs together; nothing where no share stands."""
    if not shared:
        return
    table = Table(
        *("trainer's GPUs", "servers", *(name.partition("_")[0] for name in SIZES), "recompute"),
        *("training s", "sampling s", "step s", "why not"),
        title=f"{gpus} GPUs for trainer and servers together",
    )
    for candidate in shared:
        made = candidate.plan
        assert made.server is not None
        table.add_row(
            *(str(made.gpus), f"{made.servers} of {made.server.tensor}", *_sizes(made)),
            f"{made.step.training.total:.2f}",
            f"{made.step.sampling:.1f}",
            f"{made.step.step:.1f}",
            candidate.reason or "the best",
        )
    _console().print(table)


def print_published(rows: "Sequence[Comparison]") -> None:
    """Predicted beside published."""
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


def nothing_fits(gpus: int, larger: "Plan | None") -> str:
    """What is said, with the nearest number of GPUs on which something does."""
    if larger is None:
        return f"no layout fits on {gpus} GPUs, nor on twice as many and so on; take GPUs with more memory (--gpu)"
    return f"no layout fits on {gpus} GPUs; nearest that works: --gpus {larger.gpus}, {layout_name(larger)}"


def does_not_fit(made: "Plan", nearest: "Plan | None") -> str:
    """The rule that is broken, and the nearest layout that works."""
    worst = made.worst
    text = (
        f"does not fit: {worst.total / GIB:.1f} GiB ± {made.uncertainty['memory']:.0%} on a GPU of stage {worst.stage}, "
        f"{made.gpu.name} has {made.gpu.memory / GIB:.1f} GiB"
    )
    if nearest is None or nearest.gpus != made.gpus:
        return f"{text}; {nothing_fits(made.gpus, nearest)}"
    return f"{text}; the fastest that does on {made.gpus} GPUs: {layout_name(nearest)}"


def layout_name(made: "Plan") -> str:
    """The overrides that ask for a plan's layout."""
    parallel = made.parallel
    words = [f"parallel.{key}={getattr(parallel, key) or 'null'}" for key in SIZES]
    words.append(f"parallel.sequence={str(parallel.sequence).lower()}")
    return " ".join([*words, f"training.recompute={made.recompute}"])


def _sizes(made: "Plan") -> list[str]:
    return [*(str(getattr(made.parallel, name) or "-") for name in SIZES), made.recompute]


def _uncertainty(made: "Plan") -> str:
    unsure = made.uncertainty
    return f"GiB ± {unsure['memory']:.0%}, training ± {unsure['training']:.0%}, steps ± {unsure['step']:.0%}"
