"""What works on this machine's GPU, how fast, and in which memory: every part that no CPU can show, in one unattended run.

    make gpu                                  all parts, under 20 minutes on an H100
    python benchmarks/gpu.py steps resume     some of them
    python benchmarks/gpu.py --rehearse       without a GPU, at toy sizes: shows that each part starts, runs and is read

Every part is a process of its own with a time limit, and what one does never keeps another from running. The result is
written after each: benchmarks/results/gpu-<device>.json, or with --rehearse a file that is not kept. Exit status 1 if a part failed.
Nothing is downloaded: models are random ones of the sizes below, made on the spot, or that of --model.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from common import gpu_parts
from common.gpu_parts import ROOT, LeftOut, PartlyFailed, Setting, look, setting_of
from common.machine import describe_machine
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """One thing to be shown."""

    name: str
    shows: str
    limit_s: float
    run: Callable[[Setting], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: str
    status: Literal["passed", "failed", "left out"]
    seconds: float
    result: dict[str, Any]
    said: str = ""  # why it failed or was left out


PARTS = (
    Part("doctor", "the machine, the packages", 120, gpu_parts.doctor),
    Part(
        "tests",
        "tests/gpu: the loss head's kernels, memory lent and opened elsewhere",
        240,
        gpu_parts.gpu_tests,
    ),
    Part("head", "loss head against cuBLAS, and TRL and Liger if they are installed", 180, gpu_parts.head),
    Part("steps", "bf16 and FP8 on the same weights and completions", 420, gpu_parts.steps),
    Part("weights", "export under Hugging Face's names", 120, gpu_parts.weights),
    Part("resume", "a killed run against one left alone, bit for bit", 300, gpu_parts.resume),
    Part("quickstart", "supervised warm-up and GTPO from end to end", 300, gpu_parts.quickstart),
    Part("transfer", "weights to an SGLang server on another GPU", 300, gpu_parts.transfer),
    Part("together", "trainer and server in turn on one GPU", 300, gpu_parts.together),
)


def attempt(part: Part, setting: Setting) -> Outcome:
    """Run a part in a child process, and end it with all its own children when its time is over."""
    start = time.monotonic()
    answer = setting.folder / f"{part.name}.json"
    pid = os.fork()
    if pid == 0:
        os.setsid()
        write(answer, _tried(part, setting))
        os._exit(0)
    while time.monotonic() - start < part.limit_s:
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Outcome(part.name, "failed", part.limit_s, {}, f"not done after {part.limit_s:.0f} s")
    if not answer.is_file():
        return Outcome(part.name, "failed", time.monotonic() - start, {}, "its process died")
    return Outcome(**json.loads(answer.read_text("utf-8")))


def _tried(part: Part, setting: Setting) -> dict[str, Any]:
    start = time.monotonic()
    status, result, said = "passed", {}, ""
    try:
        result = part.run(setting)
    except LeftOut as reason:
        status, said = "left out", str(reason)
    except PartlyFailed as error:
        status, result, said = "failed", error.result, str(error)
    except Exception as error:
        status, said = "failed", f"{type(error).__name__}: {error}"
    return asdict(Outcome(part.name, status, time.monotonic() - start, result, said))


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    unfinished.replace(path)


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A row for each part, then the formats of `steps` beside each other, then why parts failed."""
    table = Table("part", "shows", "", "seconds", title="GPU", title_justify="left")
    shows = {part.name: part.shows for part in PARTS}
    for outcome in outcomes:
        table.add_row(outcome.part, shows[outcome.part], outcome.status, f"{outcome.seconds:.0f}")
    console.print(table)
    formats = next((outcome.result for outcome in outcomes if outcome.part == "steps"), {})
    measured = {name: row for name, row in formats.items() if "losses" in row}
    if measured:
        table = Table(
            "format", "layers", "s/step", "peak GiB", "first loss", "last loss", "mean |logprob gap|"
        )
        for name, row in measured.items():
            figures = (row["seconds_per_step"], row["peak_gib"], row["losses"][0], row["losses"][-1])
            gap = row.get("logprob_gap", {}).get("mean_abs")
            table.add_row(
                name, row["layers"], *(f"{v:.4g}" for v in figures), "" if gap is None else f"{gap:.4f}"
            )
        console.print(table)
    for outcome in outcomes:
        if outcome.said:
            console.print(f"{outcome.part}, {outcome.status}: {outcome.said}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", default=names, help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at toy sizes")
    parser.add_argument("--model", type=Path, help="a Hugging Face checkpoint for `steps` and `weights`")
    parser.add_argument("--output", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there is: {', '.join(names)}")
    seen = look()
    device = seen["device"]
    if device is None and not arguments.rehearse:
        sys.exit(
            "gpu.py: torch sees no CUDA GPU here (gtpo-megatron doctor); --rehearse shows on a CPU that the parts run"
        )
    folder = Path(tempfile.mkdtemp(prefix="gtpo-gpu-"))
    name = "rehearsal" if arguments.rehearse else re.sub(r"\W+", "-", device.lower())
    default = ROOT / ".build" / "gpu-rehearsal.json" if arguments.rehearse else RESULTS / f"gpu-{name}.json"
    output = arguments.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    console, outcomes = Console(width=max(130, Console().width)), []
    try:
        setting = setting_of(seen, folder, arguments.model, arguments.rehearse)
        for part in PARTS:
            if part.name not in arguments.parts:
                continue
            console.print(f"{part.name}: {part.shows} ...", highlight=False)
            outcomes.append(attempt(part, setting))
            report = {"device": device or "none: a rehearsal on a CPU", "machine": describe_machine()}
            write(output, report | {"parts": [asdict(outcome) for outcome in outcomes]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_outcomes(outcomes, console)
    console.print(f"written: {output}", highlight=False)
    sys.exit(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    main()
