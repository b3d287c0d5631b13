"""Conflict analysis: against counting over positions x vocabulary, how it grows, and its worst case.

    python benchmarks/conflicts.py

The peer is the method of the authors' code, rewritten in vectorised form: count the tokens of positive and of negative
completions at every position with `torch.bincount`, over positions x vocabulary. Every case runs in a process of its own,
on one thread, and reports the best of several times, of the wall clock and of the processor (the ratio is that of processor
times, which other work on the machine does not touch), and the growth of its peak resident memory over what its inputs take.
Prints one line a case and writes benchmarks/results/conflicts.json. Takes about a minute and 5 GiB of memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.machine import describe_machine
from torch import Tensor

from gtpo_megatron.algorithm import conflict_runs

VOCABULARY = 151_936
RESULTS = Path(__file__).parent / "results" / "conflicts.json"
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """Groups of completions of one length, whose first and last `run` tokens are the same within a group."""

    groups: int
    group_size: int
    length: int
    run: int
    method: str = "ours"
    repeats: int = 5


PEER = Case(1, 8, 1024, 16, "bincount", repeats=3)
OURS = Case(1, 8, 1024, 16, repeats=50)
WORST = Case(64, 8, 4096, 4096)
LARGEST = Case(512, 16, 16_384, 16)
GROWTH = {
    "groups": [Case(groups, 16, 16_384, 16) for groups in (1, 8, 64)] + [LARGEST],
    "length": [Case(64, 16, length, 16) for length in (1024, 4096, 16_384)],
    "run": [Case(64, 16, 16_384, run) for run in (0, 16, 64, 256, 1024, 4096)],
}


def make(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids, lengths, advantages (half of each sign), group_ids."""
    generator = torch.Generator().manual_seed(0)
    count = case.groups * case.group_size
    ids = torch.randint(VOCABULARY, (count, case.length), generator=generator)
    grouped = ids.view(case.groups, case.group_size, case.length)
    grouped[:, :, : case.run] = grouped[:, :1, : case.run]
    grouped[:, :, case.length - case.run :] = grouped[:, :1, case.length - case.run :]
    advantages = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    return ids, torch.full((count,), case.length), advantages, torch.arange(count) // case.group_size


def bincount_runs(
    ids: Tensor, lengths: Tensor, advantages: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The peer, for one group: tokens counted at every position of the vocabulary's [L, V]."""
    cells = ids.shape[1] * VOCABULARY
    position = torch.arange(ids.shape[1])
    inside = position < lengths.unsqueeze(1)

    def runs(tokens: Tensor) -> Tensor:
        key = position * VOCABULARY + tokens
        positive = torch.bincount(key[inside & (advantages > 0).unsqueeze(1)], minlength=cells)
        negative = torch.bincount(key[inside & (advantages < 0).unsqueeze(1)], minlength=cells)
        conflict = (positive > 0) & (negative > 0)
        met = conflict[key] & inside & (advantages != 0).unsqueeze(1)
        return met.long().cumprod(1).sum(1)

    backwards = ids.gather(1, (lengths.unsqueeze(1) - 1 - position).clamp(min=0))
    return runs(ids), runs(backwards)


def peak_resident() -> int:
    """Peak resident memory of this process, bytes (Linux)."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(case: Case) -> dict[str, float]:
    """Best seconds by both clocks, and MiB of extra peak memory, in this process."""
    torch.set_num_threads(1)
    method: Callable[..., tuple[Tensor, Tensor]] = {"ours": conflict_runs, "bincount": bincount_runs}[
        case.method
    ]
    inputs = make(case)
    conflict_runs(*(value[:2] for value in inputs))  # loads what the first call of anything loads
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts from the present size
    before, seconds, cpu_seconds = peak_resident(), [], []
    for _ in range(case.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        prefix, suffix = method(*inputs)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    extra = (peak_resident() - before) / MIB
    assert (prefix == case.run).all() and (suffix == case.run).all()
    return {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds), "extra_mib": round(extra, 2)}


def measured(case: Case) -> dict[str, float]:
    """`measure` in a fresh process, with the case's own numbers beside the result."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return asdict(case) | json.loads(answer.stdout)


def describe(result: dict[str, float]) -> str:
    """One line of a table."""
    return (
        f"{result['groups']:4} groups x {result['group_size']:2} x {result['length']:6} tokens, run {result['run']:5}: "
        f"{1e3 * result['seconds']:9.2f} ms ({1e3 * result['cpu_seconds']:9.2f} of processor), {result['extra_mib']:7.1f} MiB extra"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return

    peer, ours, worst = measured(PEER), measured(OURS), measured(WORST)
    growth = {name: [measured(case) for case in cases] for name, cases in GROWTH.items()}
    ratio = peer["cpu_seconds"] / ours["cpu_seconds"]
    print(f"bincount      {describe(peer)}\nconflict_runs {describe(ours)}")
    print(
        f"ratio: {ratio:.0f} times faster, {peer['extra_mib'] / max(ours['extra_mib'], 0.1):.0f} times less memory"
    )
    print(f"worst case    {describe(worst)}")
    for name, results in growth.items():
        print(f"by {name}:")
        for result in results:
            print(f"  {describe(result)}")
    RESULTS.parent.mkdir(exist_ok=True)
    report = {
        "machine": describe_machine() | {"threads": 1},
        "ratio": round(ratio),
        "peer": peer,
        "ours": ours,
        "worst": worst,
        "growth": growth,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
