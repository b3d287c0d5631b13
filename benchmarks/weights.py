"""Export of a policy and its transfer to servers, a sender a pipeline stage: bytes, memory and seconds by layout.

    python benchmarks/weights.py
    python benchmarks/weights.py --layouts tp2-pp2 --receivers 1

The trainer's ranks are gloo processes with a random policy in bfloat16; the servers are plain receivers, which speak SGLang's
calls and keep the tensors; TP2 x PP2 also has one real server. For each layout and number of receivers, in turns: an update the program's way; the stage's export
alone; and the peer, one gloo broadcast of as many bytes from rank 0 to as many processes that have received into that memory
before. Then, in turns with the peer again, updates by one sender: the whole export on every rank, of which rank 0 sends all.
Medians of the ratios of successive turns are reported. Bytes that leave a rank are those that the kernel counts as
acknowledged on its TCP connections, less those of the export alone. Extra memory is the growth of the peak resident set in an
update after the first: the copy for late servers stands by then, and is on a CPU the memory that buckets are filled in.
Writes benchmarks/results/weights.json.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common.machine import describe_machine
from common.process import acknowledged_bytes, forget_peak, status
from common.words import save_tokenizer
from torch.distributed import FileStore, ProcessGroupGloo
from transformers import AutoConfig, AutoModelForCausalLM

from gtpo_megatron import control
from gtpo_megatron.config import ModelConfig, ParallelConfig, SGLangConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "weights.json"
BUCKET_MB = 16
BUCKET = BUCKET_MB << 20
TURNS, WARM = 5, 2
WITH_SGLANG = "tp2-pp2"  # also to one real server
LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
    "tp2-pp2": ("dense", 4, {"tensor": 2, "pipeline": 2}),
    "pp4": ("dense", 4, {"pipeline": 4}),
    "ep2": ("experts", 2, {"expert": 2}),
}
COMMON = dict(num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1024)
DENSE = COMMON | dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
EXPERTS = COMMON | dict(
    hidden_size=512,
    intermediate_size=1024,
    moe_intermediate_size=512,
    num_hidden_layers=8,
    num_experts=16,
    num_experts_per_tok=2,
    head_dim=64,
)


def make_checkpoint(kind: str, directory: Path) -> int:
    """A random model; the bytes of its weights."""
    kinds = {"dense": ("llama", DENSE), "experts": ("qwen3_moe", EXPERTS)}
    family, sizes = kinds[kind]
    config = AutoConfig.for_model(family, eos_token_id=None, bos_token_id=None, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    save_tokenizer(directory, config.vocab_size)
    return sum(parameter.nbytes for parameter in model.parameters())


def receive(rank: int, world: int, store: str, size: int) -> None:
    """A process of the peer: broadcasts into the same memory, between two barriers each."""
    flat = torch.zeros(size, dtype=torch.uint8)
    group = ProcessGroupGloo(FileStore(store, world), rank, world, timeout=timedelta(seconds=1800))
    try:
        while True:
            group.barrier().wait()
            group.broadcast(flat, 0).wait()
            group.barrier().wait()
    except RuntimeError:
        return  # rank 0 has ended, or says itself what went wrong


class Peer:
    """Rank 0's side of plain broadcasts; ready, with all memory touched, when the constructor returns."""

    def __init__(self, receivers: int, store: str, size: int) -> None:
        world = receivers + 1
        self._flat = torch.zeros(size, dtype=torch.uint8)
        self._group = ProcessGroupGloo(FileStore(store, world), 0, world, timeout=timedelta(seconds=1800))
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        self._group.barrier().wait()
        started = time.perf_counter()
        self._group.broadcast(self._flat, 0).wait()
        self._group.barrier().wait()
        return time.perf_counter() - started


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds, acknowledged bytes and growth of the peak resident set on this rank; all ranks begin together."""
    dist.barrier(control.group())
    forget_peak()
    before, sent, started = status("VmRSS"), acknowledged_bytes(), time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    dist.barrier(control.group())
    return {
        "seconds": seconds,
        "sent": acknowledged_bytes() - sent,
        "extra_memory": status("VmHWM") - before,
    }


def exhaust(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def by_layout(policy: Any, checkpoint: Path, urls: list[str], peer: Peer | None) -> dict[str, Any]:
    """What this rank measures with these receivers; `peer` and the engine are rank 0's."""
    from gtpo_megatron.policy.model import export_hf_weights
    from gtpo_megatron.rollout.sglang import SGLangEngine
    from gtpo_megatron.run.weights import StageWeights

    rows: dict[str, list[Any]] = {"stages": [], "export": [], "one_sender": [], "peer": [], "peer_of_one": []}
    with ExitStack() as stack:
        engine = None
        if peer is not None:
            config = SGLangConfig(urls=tuple(urls), bucket_mb=BUCKET_MB)
            engine = stack.enter_context(
                closing(SGLangEngine(config, str(checkpoint), "bf16", checkpoint, "cpu"))
            )
        stages = stack.enter_context(StageWeights(policy, str(checkpoint), BUCKET, engine))
        for turn in range(WARM + TURNS):
            rows["stages"].append(measured(lambda: stages.publish(turn)))  # noqa: B023
            rows["export"].append(measured(lambda: exhaust(stages.export.stream())))
            rows["peer"].append(peer.seconds() if peer else 0.0)

        def one_sender() -> None:
            weights = export_hf_weights(policy)
            if engine is not None:
                engine.update_weights(weights, 100 + len(rows["one_sender"]))
            exhaust(weights)

        if engine is not None:
            engine.follow_stages([], [])
        for _ in range(WARM + TURNS):
            rows["one_sender"].append(measured(one_sender))
            rows["peer_of_one"].append(peer.seconds() if peer else 0.0)
        own = sum(layout.nbytes for layout in stages.layouts)
    return {key: values[WARM:] for key, values in rows.items()} | {"own": own}


def serve(
    rank: int,
    world: int,
    parallel: dict[str, int],
    folder: Path,
    size: int,
    urls: list[str],
    counts: list[int],
    answers: Any,
) -> None:
    """One rank of the trainer."""
    from gtpo_megatron.policy.exchange.stage import is_sender
    from gtpo_megatron.policy.model import build_policy, initialize_parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=world)
    layout = ParallelConfig(**parallel)
    initialize_parallel(layout, seed=0)
    checkpoint = folder / "model"
    model = ModelConfig(path=str(checkpoint), dtype="bf16")
    policy = build_policy(model, layout, TrainingConfig(steps=1), trained=False, load_weights=False)
    result: dict[str, Any] = {"rank": rank, "sender": is_sender()}
    for count in counts:
        peer = Peer(count, f"{folder}/peer-{count}", size) if rank == 0 else None
        result[count] = by_layout(policy, checkpoint, urls[:count], peer)
    answers.put(result)
    dist.barrier(control.group())


@contextmanager
def plain_receivers(count: int) -> Iterator[list[str]]:
    """URLs of processes that take weights."""
    command = [sys.executable, "-m", "benchmarks.common.receiver"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(count)]
    try:
        yield [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def real_server(python: str, checkpoint: Path) -> Iterator[list[str]]:
    """The URL of an SGLang server with the model."""
    from gtpo_megatron.rollout.sglang.servers.launch import make_launch

    launch = make_launch(SGLangConfig(python=python), str(checkpoint), "bf16", "cpu", checkpoint)
    process, url = launch.server(0)
    try:
        yield [url]
    finally:
        process.end()


def run(layout: str, counts: list[int], python: str | None = None) -> dict[str, Any]:
    """The figures of one layout by number of receivers, or with one server of this interpreter's SGLang."""
    kind, world, parallel = LAYOUTS[layout]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = make_checkpoint(kind, folder / "model")
        receivers = real_server(python, folder / "model") if python else plain_receivers(max(counts))
        urls = stack.enter_context(receivers)
        peers = [
            context.Process(target=receive, args=(r, count + 1, f"{folder}/peer-{count}", size), daemon=True)
            for count in counts
            for r in range(1, count + 1)
        ]
        ranks = [
            context.Process(target=serve, args=(r, world, parallel, folder, size, urls, counts, answers))
            for r in range(world)
        ]
        for process in peers + ranks:
            process.start()
        try:
            results = sorted((answers.get(timeout=1800) for _ in ranks), key=lambda result: result["rank"])
            for process in ranks:
                process.join()
        finally:
            for process in peers + ranks:
                process.kill()
    return {str(count): figures(results, count, size) for count in counts}


def figures(results: list[dict[str, Any]], count: int, size: int) -> dict[str, Any]:
    """Of all ranks, the worst where the goal is one of every rank."""
    first = results[0][count]

    def ratio(ours: str, peer: str) -> float:
        pairs = zip(first[ours], first[peer], strict=True)
        return statistics.median(row["seconds"] / seconds for row, seconds in pairs)

    def median(result: dict[str, Any], key: str, what: str) -> float:
        return statistics.median(row[what] for row in result[count][key])

    sent = {r["rank"]: median(r, "stages", "sent") - median(r, "export", "sent") for r in results}
    senders = [r for r in results if r["sender"]]
    return {
        "bytes": size,
        "stage_bytes": [r[count]["own"] for r in senders],
        "seconds": median(results[0], "stages", "seconds"),
        "export_alone_s": median(results[0], "export", "seconds"),
        "one_sender_s": median(results[0], "one_sender", "seconds"),
        "warm_broadcast_s": statistics.median(first["peer"]),
        "time_over_warm_broadcast": ratio("stages", "peer"),
        "one_sender_over_warm_broadcast": ratio("one_sender", "peer_of_one"),
        "bytes_sent_over_stage_bytes": max(sent[r["rank"]] / r[count]["own"] for r in senders),
        "bytes_sent_by_others": max((sent[r["rank"]] for r in results if not r["sender"]), default=0),
        "extra_memory_over_bucket": max(median(r, "stages", "extra_memory") for r in results) / BUCKET,
        "one_sender_extra_memory_over_bucket": max(median(r, "one_sender", "extra_memory") for r in results)
        / BUCKET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4], help="numbers of them")
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), help="SGLang's interpreter"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from gtpo_megatron.run import weights  # noqa: F401  the ranks share what is imported here

    machine, layouts = describe_machine(), {}
    for layout in arguments.layouts:
        layouts[layout] = run(layout, arguments.receivers)
        if layout == WITH_SGLANG and Path(arguments.python).exists():
            layouts[layout]["sglang"] = run(layout, [1], arguments.python)["1"]
        for count, found in layouts[layout].items():
            print(
                f"{layout:8s} to {count}: {found['seconds']:.2f} s, {found['time_over_warm_broadcast']:.2f} x a plain "
                f"broadcast (one sender {found['one_sender_over_warm_broadcast']:.2f} x); bytes "
                f"{found['bytes_sent_over_stage_bytes']:.2f} x the stage's; memory "
                f"{found['extra_memory_over_bucket']:.2f} buckets"
            )
    keys = ("time_over_warm_broadcast", "extra_memory_over_bucket", "bytes_sent_over_stage_bytes")
    summary = {
        key: {name: {n: f[key] for n, f in of.items()} for name, of in layouts.items()} for key in keys
    }
    report = {"machine": machine, "bucket_bytes": BUCKET, **summary, "layouts": layouts}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
