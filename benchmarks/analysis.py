"""How long `gtpo-megatron analyse` takes, and how much memory, on a made-up run of 100,000 completions of 1,000 tokens.

    python benchmarks/analysis.py --output benchmarks/results/analysis.json

The run is written first (not timed), then analysed by the command in a process of its own, without and with the page. Where
Chromium is installed, it takes a picture of the page, and of an empty one: the difference is what the page costs to open.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common.machine import describe_machine

from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

GROUP = 8
VOCABULARY = 150_000
BROWSER_REPEATS = 5


def main() -> None:
    """Make the run, analyse it twice, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "run", Path(folder) / "page.html"
        write_run(run, arguments.completions // arguments.steps, arguments.tokens, arguments.steps)
        result = {
            "machine": describe_machine() | {"load": os.getloadavg()[0]},
            "completions": arguments.completions,
            "tokens_each": arguments.tokens,
            "without_page": measure([str(run)]),
            "with_page": measure([str(run), "--html", str(page)]),
            "page_mib": round(page.stat().st_size / 2**20, 1),
            "browser": open_page(page, Path(folder)),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")


def write_run(run: Path, count: int, length: int, steps: int) -> None:
    """Completions of a long-tailed vocabulary; those of a group begin and end alike, as trained ones do."""
    rng = np.random.default_rng(0)
    store = TrajectoryStore(run / "trajectories")
    for step in range(steps):
        tokens = (rng.zipf(1.3, (count, length)) % VOCABULARY).astype(np.int32)
        tokens[:, :8], tokens[:, -4:] = 7, 9
        rewards = rng.integers(0, 2, count).astype(float)
        store.write(
            step, [_trajectory(step, i, tokens[i], rewards, rng) for i in range(count // GROUP * GROUP)]
        )


def _trajectory(
    step: int, i: int, tokens: np.ndarray, rewards: np.ndarray, rng: np.random.Generator
) -> Trajectory:
    first = i // GROUP * GROUP
    return Trajectory(
        step=step,
        group=i // GROUP,
        index=i % GROUP,
        prompt_id=str(i // GROUP),
        prompt_ids=np.arange(64, dtype=np.int32),
        token_ids=tokens,
        logprobs=-rng.exponential(0.5, len(tokens)).astype(np.float32),
        token_versions=np.full(len(tokens), step, np.int32),
        finish_reason="stop",
        text="word " * (len(tokens) // 2),
        reward=float(rewards[i]),
        advantage=float(rewards[i] - rewards[first : first + GROUP].mean()),
    )


def measure(arguments: list[str]) -> dict[str, float]:
    """Seconds and peak memory of the command with these arguments; the peak is that of the largest child so far."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "gtpo_megatron", "analyse", *arguments, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gib": round(peak, 2)}


def open_page(page: Path, folder: Path) -> dict[str, float] | None:
    """Seconds from the start of a browser to the picture of the page, and of an empty page: medians. None without Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    empty = folder / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    )
    flags += f"--disable-component-update --disable-sync --virtual-time-budget=1000 --user-data-dir={folder / 'profile'}"
    seconds: dict[Path, list[float]] = {page: [], empty: []}
    for _ in range(BROWSER_REPEATS):
        for shown, times in seconds.items():
            start = time.perf_counter()
            command = [chromium, *flags.split(), f"--screenshot={folder / 'shown.png'}", shown.as_uri()]
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return {
        "seconds": round(statistics.median(seconds[page]), 2),
        "seconds_empty_page": round(statistics.median(seconds[empty]), 2),
    }


if __name__ == "__main__":
    main()
