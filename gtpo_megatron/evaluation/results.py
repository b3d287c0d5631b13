"""What an evaluation leaves behind: evaluation.json, table.md and pass_at_k.png, each whole or absent."""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtpo_megatron import __version__
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.curves import plot_curves
from gtpo_megatron.evaluation.estimates import Estimate

FORMAT = "gtpo_megatron.evaluation/1"
RESULT = "evaluation.json"


def grader() -> dict[str, str]:
    """Name and versions of what judges answers."""
    return {
        "name": "gtpo_megatron.rewards.terms.math_verify_correct, rule one_answer",
        "gtpo-megatron": __version__,
        "math-verify": importlib.metadata.version("math-verify"),
    }


def write_results(directory: Path, results: Mapping[str, Any]) -> None:
    """Write the three files; evaluation.json last, so that where it stands the others do."""
    write_text(directory / "table.md", table(results))
    curves = [(name, suite["figures"]) for name, suite in results["suites"].items()]
    plot_curves(directory / "pass_at_k.png", curves, results["policy"]["name"][-90:])
    write_text(directory / RESULT, json.dumps(results, indent=1, allow_nan=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The results in a directory, or a file of them.

    Raises:
        UserError: there are none, or the file is damaged or of another format.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; give the directory of a finished `gtpo-megatron evaluate`"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON, it is damaged or cut short: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f"{file}: not the results of an evaluation that this version reads ({FORMAT})")
    return results


def write_text(path: Path, text: str) -> None:
    """Write a file; atomic and durable."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def table(results: Mapping[str, Any]) -> str:
    """All figures as Markdown, with the policy and the grader that they are of."""
    lines = ["| suite | prompts | samples | figure | value | standard error | 95% interval |"]
    lines.append("|---|---:|---:|---|---:|---:|---|")
    for name, suite in results["suites"].items():
        for figure, given in suite["figures"].items():
            cells = [name, str(given["prompts"]), str(suite["samples"]), figure, *shown(figure, given)]
            lines.append(f"| {' | '.join(cells)} |")
    judge = results["grader"]
    lines += ["", f"policy: {results['policy']['name']}, sampled by {results['engine']}"]
    lines += [
        "",
        f"grader: {judge['name']}; gtpo-megatron {judge['gtpo-megatron']}, math-verify {judge['math-verify']}",
    ]
    return "\n".join(lines) + "\n"


def shown(figure: str, given: Mapping[str, Any] | Estimate) -> tuple[str, str, str]:
    """Value, standard error and interval as text: shares in percent, lengths in tokens, entropies in nats."""
    values = given.as_dict() if isinstance(given, Estimate) else given
    percent = figure not in ("length", "entropy")
    scale, digits, unit = (100, 1, "%") if percent else (1, 1 if figure == "length" else 3, "")

    def text(value: float | None) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    interval = f"{text(values['low'])} to {text(values['high'])}"
    return f"{text(values['value'])}{unit}", text(values["stderr"]), interval
