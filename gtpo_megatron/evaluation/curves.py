"""pass@k and maj@k over k, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]  # by name, `pass@4` and others; see `estimates.Estimate`


def plot_curves(path: Path, curves: Sequence[tuple[str, Figures]], title: str) -> None:
    """Write a PNG: for each (label, figures) a line of pass@k with its 95% band, and a dashed one of maj@k. Atomic.

    The axis ends above the highest band: accuracies of a few percent are to be seen as well.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    highest, every = 0.05, set()
    for number, (label, figures) in enumerate(curves):
        for kind, style in (("pass", "-o"), ("maj", "--s")):
            if not (found := _by_k(figures, kind)):
                continue
            every |= set(found)
            highest = max([highest, *(given["high"] for given in found.values() if kind == "pass")])
            values = [given["value"] for given in found.values()]
            axes.plot(
                list(found), values, style, color=f"C{number}", markersize=4, label=f"{label}, {kind}@k"
            )
            if kind == "pass":
                low, high = ([given[end] for given in found.values()] for end in ("low", "high"))
                axes.fill_between(list(found), low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(every), [str(k) for k in sorted(every)], minor=False)
    axes.set_ylim(0, min(1.02, 1.1 * highest))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel("k")
    axes.set_ylabel("share of prompts; bands: 95% over prompts")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def _by_k(figures: Figures, kind: str) -> dict[int, Mapping[str, Any]]:
    """Of `pass` or `maj` the figures in order of k."""
    prefix = f"{kind}@"
    return {
        int(name.removeprefix(prefix)): figures[name]
        for name in sorted((n for n in figures if n.startswith(prefix)), key=lambda n: int(n[len(prefix) :]))
    }
