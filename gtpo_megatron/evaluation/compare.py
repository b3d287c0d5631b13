"""Two evaluations of the same prompts: the paired difference of each figure, and the prompts that changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.curves import plot_curves
from gtpo_megatron.evaluation.estimates import bounds, estimate
from gtpo_megatron.evaluation.results import read_results, shown


def compare(first: Path, second: Path) -> dict[str, Any]:
    """For each suite of both: figures as B - A paired by prompt, and the prompts whose share of right samples changed.

    Pairing removes how hard a prompt is from the uncertainty. JSON-able.

    Raises:
        UserError: either is no evaluation, they share no suite or no prompt of a suite, or different graders judged them.
    """
    a, b = read_results(first), read_results(second)
    if a["grader"] != b["grader"]:
        raise UserError(
            f"{first} and {second} were judged by different graders ({a['grader']} and {b['grader']}): a difference "
            "could be the graders'. Evaluate again with one version"
        )
    shared = [name for name in a["suites"] if name in b["suites"]]
    if not shared:
        raise UserError(
            f"{first} and {second} have no suite in common ({', '.join(a['suites'])} and {', '.join(b['suites'])})"
        )
    return {
        "a": {"path": str(first), "policy": a["policy"]["name"], "engine": a["engine"]},
        "b": {"path": str(second), "policy": b["policy"]["name"], "engine": b["engine"]},
        "suites": {name: _suite(name, a["suites"][name], b["suites"][name]) for name in shared},
    }


def _suite(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    pairs = _pairs(a["rows"], b["rows"])
    if not pairs:
        raise UserError(
            f"suite {name}: the two evaluations have no prompt in common; these are different sets"
        )
    rows = [(one["values"], two["values"]) for one, two in pairs]
    figures = [key for key in rows[0][0] if all(key in one and key in two for one, two in rows)]
    return {
        "prompts": len(pairs),
        "alone": {"a": len(a["rows"]) - len(pairs), "b": len(b["rows"]) - len(pairs)},
        "same_sampling": a["sampling"] == b["sampling"],
        "figures": {key: _paired(key, [(one[key], two[key]) for one, two in rows]) for key in figures},
        "changed": _changed(pairs),
    }


def _pairs(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    by_prompt = {(row["id"], row["digest"]): row for row in b}
    return [
        (row, by_prompt[row["id"], row["digest"]]) for row in a if (row["id"], row["digest"]) in by_prompt
    ]


def _paired(name: str, values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    low, high = bounds(name)
    difference = estimate([two - one for one, two in values], low - high, high - low)
    return {
        "a": estimate([one for one, _ in values], low, high).as_dict(),
        "b": estimate([two for _, two in values], low, high).as_dict(),
        "difference": difference.as_dict(),
    }


def _changed(pairs: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Prompts whose share of right samples differs, the largest change first."""
    changed = [
        {
            "id": one["id"],
            "question": one["question"],
            "a": f"{one['right']}/{one['samples']}",
            "b": f"{two['right']}/{two['samples']}",
            "change": two["right"] / two["samples"] - one["right"] / one["samples"],
        }
        for one, two in pairs
        if one["right"] * two["samples"] != two["right"] * one["samples"]
    ]
    return sorted(changed, key=lambda row: (-abs(row["change"]), row["change"], row["id"]))


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """The curves of both, of the prompts that they share, as a PNG. Raises UserError where it cannot be written."""
    several = len(found["suites"]) > 1
    curves = [
        (
            side.upper() + (f", {name}" if several else ""),
            {key: given[side] for key, given in suite["figures"].items()},
        )
        for name, suite in found["suites"].items()
        for side in ("a", "b")
    ]
    title = "\n".join(f"{side.upper()}: {found[side]['policy'][-90:]}" for side in ("a", "b"))
    try:
        plot_curves(path, curves, title)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def as_text(found: Mapping[str, Any], most: int = 20) -> str:
    """The comparison for a terminal; of the changed prompts the first `most`."""
    lines = [f"A: {found['a']['policy']} ({found['a']['path']})"]
    lines += [f"B: {found['b']['policy']} ({found['b']['path']})"]
    for name, suite in found["suites"].items():
        lines += ["", f"{name}: {suite['prompts']} prompts in both"]
        if any(suite["alone"].values()):
            lines[-1] += f"; left out: {suite['alone']['a']} of A alone, {suite['alone']['b']} of B alone"
        if not suite["same_sampling"]:
            lines.append("  sampled differently: part of a difference may be the sampling's")
        for figure, given in suite["figures"].items():
            a, b, difference = (shown(figure, given[key]) for key in ("a", "b", "difference"))
            lines.append(f"  {figure:<12} {a[0]:>8} -> {b[0]:>8}   {difference[0]:>8}  ({difference[2]})")
        changed = suite["changed"]
        lines.append(
            f"  {sum(row['change'] > 0 for row in changed)} prompts better, "
            f"{sum(row['change'] < 0 for row in changed)} worse"
        )
        for row in changed[:most]:
            lines.append(
                f"    {row['id']}: {row['a']} -> {row['b']}  {' '.join(row['question'].split())[:80]}"
            )
        if len(changed) > most:
            lines.append(f"    ... and {len(changed) - most} more (--json)")
    return "\n".join(lines)
