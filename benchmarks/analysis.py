"""How long `gtpo-megatron analyse` takes, and how much memory, on a made-up run of 100,000 completions of 1,000 tokens.

    python benchmarks/analysis.py --output benchmarks/results/analysis.json

The run is written first (not timed), then analysed by the command in a process of its own, without and with the page.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

GROUP = 8
VOCABULARY = 150_000


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
            "completions": arguments.completions,
            "tokens_each": arguments.tokens,
            "cpus": len(os.sched_getaffinity(0)),
            "without_page": measure([str(run)]),
            "with_page": measure([str(run), "--html", str(page)]) | {"page_mib": page.stat().st_size / 2**20},
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


if __name__ == "__main__":
    main()
