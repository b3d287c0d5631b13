"""The loss head: against logits held whole, and against TRL's way; forward and backward, time and memory.

    python benchmarks/head.py                  on a CPU: ratios to the peers
    python benchmarks/head.py --cases 0 2 --repeats 3      some of the cases only
    python benchmarks/head.py --device cuda    on a GPU: fraction of cuBLAS's time for the same products, and peak memory

Peers on a CPU, all in float32: `whole` is log_softmax, gather and entropy of [tokens, vocabulary] logits; `trl` is what
TRL's GRPO trainer does with them, `selective_log_softmax` and `entropy_from_logits` of the installed trl, if it is (it is
not needed by anything else: pip install --no-deps trl==0.24.0). The fused losses of liger-kernel and
cut-cross-entropy are Triton kernels without a CPU path, and give no entropy: they are not measured.

Two ways of each: `time`, the weight's gradient is new, and `time_added`, it is added to one that is there, as in every
micro-batch of training (ours adds each tile to it, `main_grad`; a peer makes its own and autograd adds it).

Ours and a peer take turns (A B A B ...) in one process, and the median of the ratios of successive turns is reported,
of the wall clock and of processor time, which other work on the machine disturbs less.
Peak memory comes from a process per method: growth of the resident size over the inputs, less the two gradients, which
every method has to make. Writes benchmarks/results/head.json (head_cuda.json).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from common.machine import describe_machine
from torch import Tensor

from gtpo_megatron.policy.head import token_statistics

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
Method = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    tokens: int
    hidden: int
    vocabulary: int
    repeats: int = 5


CASES = (
    Case(256, 576, 49_152),
    Case(1024, 576, 49_152),
    Case(256, 896, 151_936),
    Case(1024, 896, 151_936),
    Case(512, 2048, 151_936, 3),
)
GPU_CASE = Case(8192, 4096, 151_936, 10)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    result = token_statistics(hidden, weight, targets, vocab_size=len(weight))
    return result.logprobs, result.entropy


def ours_added(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's gradient goes into the one that is there."""
    result = token_statistics(hidden, weight, targets, vocab_size=len(weight), main_grad=weight.grad)
    return result.logprobs, result.entropy


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities with a gradient, entropy without."""
    log_probabilities = (hidden @ weight.t()).float().log_softmax(1)
    with torch.no_grad():
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
    return log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eight completions, as TRL's trainer sees them."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = (hidden @ weight.t()).view(8, -1, len(weight))
    logprobs = selective_log_softmax(logits, targets.view(8, -1))
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return logprobs.flatten(), entropy.flatten()


METHODS: dict[str, Method] = {"ours": ours, "whole": whole, "trl": trl}


def make(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; logits with a standard deviation of about 2."""
    torch.manual_seed(0)
    hidden = torch.empty(case.tokens, case.hidden, device=device, dtype=dtype).normal_()
    weight = torch.empty(case.vocabulary, case.hidden, device=device, dtype=dtype)
    weight.normal_(std=2 / case.hidden**0.5)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(case.vocabulary, (case.tokens,), device=device),
    )


@dataclass(frozen=True)
class Turn:
    """Seconds of one forward and backward."""

    forward: float
    backward: float
    processor: float  # of both together, over all threads

    @property
    def both(self) -> float:
        return self.forward + self.backward


def turn(method: Method, inputs: tuple[Tensor, Tensor, Tensor], *, added: bool = False) -> Turn:
    """One forward and one backward; the weight's gradient is added to what it has, or new."""
    inputs[0].grad = None
    if not added:
        inputs[1].grad = None
    processor = time.process_time()
    start = time.perf_counter()
    logprobs, _ = method(*inputs)
    middle = time.perf_counter()
    logprobs.mean().backward()
    return Turn(middle - start, time.perf_counter() - middle, time.process_time() - processor)


def compare(case: Case, peer: str, *, added: bool = False) -> dict[str, float]:
    """Ours and the peer by turns, in this process. The first turn of each only warms up and is compared."""
    inputs = make(case)
    if added:
        inputs[1].grad = torch.zeros_like(inputs[1])
    methods = (ours_added if added else ours, METHODS[peer])
    checks = []
    for method in methods:
        turn(method, inputs, added=added)
        checks.append((*(value.detach() for value in method(*inputs)), inputs[0].grad))
    for value, expected in zip(*checks, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    del checks
    turns = [tuple(turn(method, inputs, added=added) for method in methods) for _ in range(case.repeats)]
    return {
        "ratio": round(statistics.median(a.both / b.both for a, b in turns), 3),
        "processor_ratio": round(statistics.median(a.processor / b.processor for a, b in turns), 3),
        "forward_s": min(a.forward for a, _ in turns),
        "backward_s": min(a.backward for a, _ in turns),
        "peer_forward_s": min(b.forward for _, b in turns),
        "peer_backward_s": min(b.backward for _, b in turns),
    }


def extra_memory(case: Case, name: str) -> dict[str, float]:
    """MiB that one forward and backward add to this process at their peak, without the gradients themselves."""
    turn(METHODS[name], make(Case(16, 64, 256)))  # loads what the first call of anything loads
    inputs = make(case)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts from the present size
    before = _peak_resident()
    turn(METHODS[name], inputs)
    gradients = inputs[0].nbytes + inputs[1].nbytes
    return {"extra_mib": round((_peak_resident() - before - gradients) / MIB, 1)}


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def in_fresh_process(job: str, case: Case, name: str) -> dict[str, float]:
    """One of `main`'s jobs elsewhere."""
    command = [sys.executable, __file__, "--job", json.dumps([job, asdict(case), name])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_cpu(cases: list[Case]) -> dict[str, object]:
    """Every case against every peer that is installed."""
    peers = ["whole"] + (["trl"] if importlib.util.find_spec("trl") else [])
    rows = []
    for case in cases:
        memory = {name: in_fresh_process("memory", case, name)["extra_mib"] for name in ("ours", *peers)}
        times = {peer: in_fresh_process("compare", case, peer) for peer in peers}
        added = {"whole": in_fresh_process("compare_added", case, "whole")}
        rows.append(asdict(case) | {"extra_mib": memory, "time": times, "time_added": added})
        print(
            f"{case.tokens:5} tokens x {case.vocabulary:6} vocabulary, hidden {case.hidden:4}: {memory['ours']:7.0f} MiB extra;",
            "; ".join(
                f"time {times[peer]['ratio']:.2f} of {peer}'s (processor {times[peer]['processor_ratio']:.2f}), memory 1/{memory[peer] / max(memory['ours'], 1):.0f}"
                for peer in peers
            ),
            f"; added to a gradient: time {added['whole']['ratio']:.2f} of whole's",
            flush=True,
        )
    if "trl" not in peers:
        print("trl: not installed")
    print("liger-kernel, cut-cross-entropy: Triton only, no entropy: not measured")
    versions = {"trl": importlib.metadata.version("trl")} if "trl" in peers else {"trl": "not installed"}
    return {"machine": describe_machine() | versions, "cases": rows}


def run_cuda() -> dict[str, object]:
    """Ours in bfloat16 against cuBLAS alone for the same products: 2MHV forward, 6MHV backward (2MHV of them again)."""
    case = GPU_CASE
    hidden, weight, targets = inputs = make(case, "cuda", torch.bfloat16)
    inputs[1].main_grad = torch.zeros(weight.shape, device="cuda")
    chunk = 16_384

    def products() -> tuple[float, float]:
        """cuBLAS, on column blocks, as whole logits would take 2.3 GiB."""
        logits = torch.empty(case.tokens, chunk, device="cuda", dtype=torch.bfloat16)
        blocks = weight.detach().split(chunk)

        def forward() -> None:
            for block in blocks:
                torch.mm(hidden.detach(), block.t(), out=logits[:, : len(block)])

        def backward() -> None:
            forward()
            for block in blocks:
                torch.mm(logits[:, : len(block)], block)
                torch.mm(logits[:, : len(block)].t(), hidden.detach())

        return _gpu_seconds(forward, case.repeats), _gpu_seconds(backward, case.repeats)

    def head(implementation: str) -> dict[str, float]:
        def forward() -> Tensor:
            return token_statistics(
                hidden,
                weight,
                targets,
                vocab_size=case.vocabulary,
                implementation=implementation,
                main_grad=weight.main_grad,
            ).logprobs.sum()

        loss = forward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.backward(retain_graph=True)
        hidden.grad = None
        seconds = (
            _gpu_seconds(forward, case.repeats),
            _gpu_seconds(lambda: loss.backward(retain_graph=True), case.repeats),
        )
        return {
            "forward_s": seconds[0],
            "backward_s": seconds[1],
            "cublas_fraction_forward": cublas[0] / seconds[0],
            "cublas_fraction_backward": cublas[1] / seconds[1],
            "extra_mib": (torch.cuda.max_memory_allocated() - before) / MIB,
        }

    cublas = products()
    results = {name: head(name) for name in ("triton", "torch")}
    for name, result in results.items():
        print(
            f"{name}: forward {result['cublas_fraction_forward']:.0%}, backward {result['cublas_fraction_backward']:.0%} "
            f"of cuBLAS's speed; {result['extra_mib']:.0f} MiB extra, the gradient of the hidden states included"
        )
    peers = {name: _peer_on_gpu(method, case) for name, method in _gpu_peers().items()}
    for name, result in peers.items():
        print(
            f"{name}: forward {result['forward_s']:.4f} s, backward {result['backward_s']:.4f} s, {result['extra_mib']:.0f} MiB extra"
        )
    machine = describe_machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"machine": machine, "case": asdict(case), "cublas_s": cublas, "head": results, "peers": peers}


def _gpu_peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The peers that are installed; each gives a loss."""
    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "whole": lambda *inputs: whole(*inputs)[0].sum()
    }
    if importlib.util.find_spec("trl"):
        peers["trl"] = lambda *inputs: trl(*inputs)[0].sum()
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")  # cross entropy alone, no entropy
        peers["liger"] = lambda hidden, weight, targets: fused(weight, hidden, targets)
    return peers


def _peer_on_gpu(method: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> dict[str, float]:
    """One forward and backward with gradients of both factors. Liger's does the backward's work in its forward."""
    inputs = make(case, "cuda", torch.bfloat16)

    def forward() -> Tensor:
        return method(*inputs)

    def both() -> None:
        inputs[0].grad = inputs[1].grad = None
        forward().backward()

    both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _gpu_seconds(forward, case.repeats), _gpu_seconds(both, case.repeats)
    return {
        "forward_s": seconds[0],
        "backward_s": seconds[1] - seconds[0],
        "extra_mib": (torch.cuda.max_memory_allocated() - before) / MIB,
    }


def _gpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median over repeats, by CUDA events, after one warm-up."""
    function()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="CPU: numbers of cases"
    )
    parser.add_argument("--repeats", type=int, help="CPU: turns of each method in a case")
    parser.add_argument("--output", type=Path, help="where the result goes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job, case, name = json.loads(arguments.job)
        jobs = {"compare": compare, "compare_added": partial(compare, added=True), "memory": extra_memory}
        function = jobs[job]
        print(json.dumps(function(Case(**case), name)))
        return
    repeats = {"repeats": arguments.repeats} if arguments.repeats else {}
    cases = [replace(CASES[number], **repeats) for number in arguments.cases]
    report = run_cuda() if arguments.device == "cuda" else run_cpu(cases)
    RESULTS.mkdir(exist_ok=True)
    path = arguments.output or RESULTS / ("head_cuda.json" if arguments.device == "cuda" else "head.json")
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
