"""From a dump's files to findings, a table, and a page; one pass, a step in memory at a time."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gtpo_megatron.analysis.conflict import examine
from gtpo_megatron.analysis.dump import Dump
from gtpo_megatron.analysis.findings import Figures, Findings
from gtpo_megatron.analysis.html import Page
from gtpo_megatron.analysis.readers.formats import open_dump
from gtpo_megatron.analysis.tokens import Vocabulary
from gtpo_megatron.errors import UserError


def analyse(
    paths: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    trust: bool = False,
    html: Path | None = None,
    against: Path | None = None,
) -> Figures:
    """Analyse a dump, and write its page if asked.

    Args:
        paths: files or directories of one dump.
        tokenizer: a local folder; for a run of ours its own is found.
        trust: load pickles.
        html: where the page goes.
        against: another dump, shown beside this one on the page.

    Returns:
        The figures of `Findings.figures`.

    Raises:
        UserError: the dump is unknown, damaged, empty, or lacks what cannot be done without.
    """
    dump = open_dump(paths, trust)
    vocabulary = _vocabulary(dump, tokenizer)
    findings = Findings(dump)
    page = Page(vocabulary) if html is not None else None
    for batch in dump.batches:
        examined = examine(vocabulary.complete(batch, dump.format))
        step = findings.add(examined)
        if page is not None:
            page.add(examined, step)
    if not findings.steps:
        raise UserError(f"{', '.join(map(str, paths))}: no completions in it")
    figures = findings.figures(vocabulary)
    if page is not None:
        other = None if against is None else _beside(page, against, tokenizer, trust)
        page.write(html, figures, title=", ".join(path.name or str(path) for path in paths), other=other)
    return figures


def _beside(page: Page, path: Path, tokenizer: Path | None, trust: bool) -> Figures:
    """Put another dump on the page; its title and the figures of its steps."""
    dump = open_dump([path], trust)
    vocabulary = _vocabulary(dump, tokenizer)
    findings = Findings(dump)
    page.beside(vocabulary)
    for batch in dump.batches:
        examined = examine(vocabulary.complete(batch, dump.format))
        page.add(examined, findings.add(examined))
    if not findings.steps:
        raise UserError(f"{path}: no completions in it")
    return {
        "title": path.name or str(path),
        "by_step": findings.figures(vocabulary)["by_step"],
    }


def _vocabulary(dump: Dump, tokenizer: Path | None) -> Vocabulary:
    if tokenizer is not None:
        return Vocabulary.load(tokenizer)
    if dump.tokenizer is not None and Path(dump.tokenizer).is_dir():
        return Vocabulary.load(dump.tokenizer)
    return Vocabulary()


def print_figures(figures: Figures, console: Console) -> None:
    """The main figures as a table, and what the dump could not say."""
    table = Table(title=f"{figures['format']}: {figures['completions']:,} completions", title_justify="left")
    table.add_column("finding")
    table.add_column("value", justify="right")
    for name, value in _rows(figures):
        table.add_row(name, value)
    console.print(table)
    strings = figures["conflict"]["strings"][:10]
    if strings:
        shown = ", ".join(repr(s["text"]) if s["text"] is not None else str(s["token"]) for s in strings)
        console.print(Text(f"Most in conflict: {shown}"))
    for lack in figures["lacks"]:
        console.print(Text(f"Not in this dump: {lack}"))


def _rows(figures: Figures) -> list[tuple[str, str]]:
    conflict, gradient = figures["conflict"], figures["grpo_gradient"]
    return [
        ("steps", f"{figures['steps']:,}"),
        ("groups", f"{figures['groups']:,}"),
        ("groups without signal", f"{figures['groups_without_signal']:,}"),
        ("tokens", f"{figures['tokens']:,}"),
        (
            "protected tokens (weight 0)",
            f"{figures['protected_tokens']:,} ({conflict['protected_share']:.2%})",
        ),
        (
            "amplified tokens (weight 2)",
            f"{figures['amplified_tokens']:,} ({conflict['amplified_share']:.2%})",
        ),
        ("conflict run from the start, mean", f"{conflict['prefix_mean']:.2f}"),
        ("conflict run from the end, mean", f"{conflict['suffix_mean']:.2f}"),
        ("GRPO's coefficients on conflict tokens", _percent(gradient["coefficient_share"])),
        ("GRPO's gradient of sampled logits there", _percent(gradient["logit_share"])),
        ("entropy of the first step, nats (ln 2 = 0.693)", _known(figures["entropy"]["initial"])),
        ("reward, mean", _known(figures["reward"]["mean"])),
        ("length, mean", _known(figures["length"]["mean"])),
        ("truncated", _percent(figures["truncated"])),
        ("repeated 4-grams", _percent(figures["repetition"])),
        ("different completions in a group", _percent(figures["diversity"])),
        ("staleness, steps, mean", _known(figures["staleness"]["mean"])),
    ]


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"


def _known(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"
