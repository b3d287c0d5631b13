"""The control and data planes without a model: what a step costs each rank in bytes, memory and time, by number of ranks.

    python benchmarks/scale.py
    python benchmarks/scale.py --worlds 2 4 8 16 32

Every rank is a data-parallel replica of its own, on gloo. Ours: rank 0 plans the packing, scatters each replica's rows,
tells all the table of the batch and the results of the pass (four floats a completion, in the place of `policy.step`'s
report, which needs Megatron), and all agree whether to stop. The peer, in the same processes: the whole batch to every rank
by `all_gather_object`, as the program did before, with one more of it for the stop. Received bytes are those that the kernel counts
for the process's connections; memory is the growth of its peak resident set. Then rank 0 keeps the others waiting, and their
processor time is taken. Figures of the largest batch at 1,024 ranks are extrapolated by least squares over the worlds that
were measured, not measured themselves. Prints one line a world and writes benchmarks/results/scale.json.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common.machine import describe_machine
from common.process import forget_peak, received_bytes, status

from gtpo_megatron import control
from gtpo_megatron.trajectories.packing import plan_micro_batches
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable, shares_of

RESULTS = Path(__file__).parent / "results" / "scale.json"
GROUPS, GROUP_SIZE, PROMPT, LONGEST = 64, 8, 120, 1000
BUDGET = 8192
WAIT_S = 2.0
LARGE = {"ranks": 1024, "completions": 512 * 16, "prompt": 120, "tokens": 2000}  # what is extrapolated to
GIB = 1 << 30


def make_batch() -> list[Trajectory]:
    """Completions of many lengths, with texts of four characters a token: as sampled and analysed."""
    random = np.random.default_rng(0)

    def trajectory(group: int, index: int, prompt: np.ndarray) -> Trajectory:
        length = int(random.integers(LONGEST // 10, LONGEST + 1))
        return Trajectory(
            step=0,
            group=group,
            index=index,
            prompt_id=f"row-{group}",
            prompt_ids=prompt,
            token_ids=random.integers(0, 151_936, length).astype(np.int32),
            logprobs=random.normal(size=length).astype(np.float32),
            token_versions=np.zeros(length, np.int32),
            finish_reason="stop",
            text="word" * length,
            answer="18",
            reward_terms={"accuracy": 1.0, "format": 1.0},
            advantage=float(random.normal()),
        )

    prompts = [random.integers(0, 151_936, PROMPT).astype(np.int32) for _ in range(GROUPS)]
    return [trajectory(g, i, prompts[g]) for g in range(GROUPS) for i in range(GROUP_SIZE)]


def row_bytes(rows: Sequence[Any]) -> int:
    """Bytes of what a rank trains on: ids of prompt and completion, logprobs of the completion."""
    return sum(row.prompt_ids.nbytes + row.token_ids.nbytes + row.logprobs.nbytes for row in rows)


def ours(batch: list[Trajectory] | None) -> int:
    """One step's traffic; the bytes of this rank's own rows."""
    shares = None
    if batch is not None:
        plan = plan_micro_batches(
            [len(t.prompt_ids) for t in batch],
            [t.length for t in batch],
            token_budget=BUDGET,
            data_parallel=dist.get_world_size(),
        )
        shares = shares_of(batch, plan)
    own = row_bytes(list(control.scatter(shares).rows().values()))
    table = control.broadcast_from_zero(None if batch is None else BatchTable.of(batch))
    names = ("entropy", "gap", "gap_max", "gate")
    report = None if batch is None else {name: np.zeros(len(table), np.float32) for name in names}
    control.broadcast_from_zero(report)
    control.agree(False)
    return own


def gathered_by_all(batch: list[Trajectory] | None) -> int:
    """The same step as before: everything of everybody to everybody."""
    for value in (batch, None):
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (True, value))
    return 0


def measured(
    step: Callable[[list[Trajectory] | None], int], batch: list[Trajectory] | None
) -> dict[str, Any]:
    """Bytes received, growth of the peak resident set and seconds of one step on this rank."""
    dist.barrier(control.group())
    forget_peak()
    before, received, started = status("VmRSS"), received_bytes(), time.perf_counter()
    own = step(batch)
    seconds = time.perf_counter() - started
    return {
        "received": received_bytes() - received,
        "extra_memory": status("VmHWM") - before,
        "seconds": seconds,
        "own_rows": own,
    }


def waiting() -> float:
    """Processor seconds a second of this rank while rank 0 is busy elsewhere."""
    dist.barrier(control.group())
    started, processor = time.perf_counter(), time.process_time()
    if dist.get_rank() == 0:
        time.sleep(WAIT_S)
    control.broadcast_from_zero("done" if dist.get_rank() == 0 else None)
    return (time.process_time() - processor) / (time.perf_counter() - started)


def serve(rank: int, world: int, store: str, answers: Any) -> None:
    """One rank: both ways once to warm up, then measured in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    batch = make_batch() if rank == 0 else None
    result: dict[str, Any] = {"rank": rank}
    for _ in range(2):
        for name, step in (("ours", ours), ("all_gather", gathered_by_all)):
            result[name] = measured(step, batch)
    result["waiting"] = waiting()
    answers.put(result)
    dist.barrier(control.group())
    dist.destroy_process_group()


def run(world: int) -> dict[str, Any]:
    """The worst of all ranks, each way."""
    context = multiprocessing.get_context("fork")  # the ranks share the memory of torch's code
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ranks = [context.Process(target=serve, args=(r, world, store, answers)) for r in range(world)]
        for process in ranks:
            process.start()
        results = sorted((answers.get(timeout=600) for _ in ranks), key=lambda result: result["rank"])
        for process in ranks:
            process.join()
    others = results[1:]  # rank 0 has the batch, and receives next to nothing
    figures: dict[str, Any] = {"ranks": world}
    for name in ("ours", "all_gather"):
        figures[name] = {
            "received": max(r[name]["received"] for r in others),
            "extra_memory": max(r[name]["extra_memory"] for r in others),
            "extra_memory_of_rank_zero": results[0][name]["extra_memory"],
            "seconds": max(r[name]["seconds"] for r in results),
        }
    worst = max(others, key=lambda r: r["ours"]["received"] / r["ours"]["own_rows"])["ours"]
    figures["own_rows"] = max(r["ours"]["own_rows"] for r in others)
    figures["received_over_own_rows"] = worst["received"] / worst["own_rows"]
    completions = GROUPS * GROUP_SIZE
    figures["over_goal"] = max(
        r["ours"]["received"] / (1.2 * r["ours"]["own_rows"] + 64 * completions) for r in others
    )
    figures["waiting_processor_share"] = max(r["waiting"] for r in others)
    return figures


def fitted(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def extrapolated(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """Fits over the worlds, and what they say of the large batch."""
    completions, batch = GROUPS * GROUP_SIZE, row_bytes(make_batch())
    slope, fixed = fitted([w["own_rows"] for w in worlds], [w["ours"]["received"] for w in worlds])
    growth, start = fitted(
        [w["ranks"] * batch for w in worlds], [w["all_gather"]["extra_memory"] for w in worlds]
    )
    memory, base = fitted([w["own_rows"] for w in worlds], [w["ours"]["extra_memory"] for w in worlds])
    large = LARGE["completions"] * 4 * (LARGE["prompt"] + 2 * LARGE["tokens"])
    own, per_completion = large / LARGE["ranks"], fixed / completions
    return {
        "received": {"bytes_a_byte_of_own_rows": slope, "bytes_a_completion": per_completion},
        "all_gather_memory_over_ranks_times_rows": growth,
        "large_batch": LARGE | {"rows_gib": large / GIB},
        "table_bytes_per_completion": per_completion,
        "predicted_gib_per_rank_at_1024": {
            "ours": (max(memory, slope) * own + base / completions * LARGE["completions"]) / GIB,
            "all_gather": (growth * LARGE["ranks"] * large + start) / GIB,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of ranks")
    arguments = parser.parse_args()
    worlds = []
    for world in sorted(arguments.worlds):
        worlds.append(run(world))
        figures = worlds[-1]
        print(
            f"{world:3d} ranks: received {figures['ours']['received'] / 1e6:.3f} MB "
            f"({figures['received_over_own_rows']:.2f} x own rows, {figures['over_goal']:.2f} of the goal), "
            f"all_gather {figures['all_gather']['received'] / 1e6:.1f} MB; memory "
            f"{figures['ours']['extra_memory'] / 1e6:.2f} and {figures['all_gather']['extra_memory'] / 1e6:.1f} MB; "
            f"{figures['ours']['seconds']:.3f} and {figures['all_gather']['seconds']:.3f} s; "
            f"waiting {100 * figures['waiting_processor_share']:.2f} % of a core"
        )
    report = {
        "machine": describe_machine() | {"threads": 1},
        "batch": {"completions": GROUPS * GROUP_SIZE, "row_bytes": row_bytes(make_batch())},
        "bytes_per_rank_over_own_rows": worlds[-1]["received_over_own_rows"],
        "bytes_over_goal": max(w["over_goal"] for w in worlds),
        **extrapolated(worlds),
        "worlds": worlds,
    }
    predicted = report["predicted_gib_per_rank_at_1024"]
    print(
        f"at {LARGE['ranks']} ranks (extrapolated): {predicted['ours']:.4f} GiB a rank, "
        f"all_gather {predicted['all_gather']:.0f} GiB"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
