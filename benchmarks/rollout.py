"""Rollouts from real SGLang servers on this machine's CPU: client, weight transfer, and sampling beside training.

    python benchmarks/rollout.py [--parts throughput transfer overlap]

`throughput`: completions of equal lengths at equal concurrency and temperature from one server with a tiny model (which
makes the client's share of the work as large as it can be), by SGLangEngine and by `sglang.bench_serving`, in turns
(A B A B ...); the median of the ratios of successive turns is reported.
`transfer`: seconds of `update_weights` by each way, for weights of SmolLM2-135M's shapes in float32, in turns with broadcasts of
as many bytes between two processes over gloo, into fresh memory and into memory used before.
`overlap`: a step of training a small model with one batch sampled ahead (rollout.staleness: 1) against steps that sample and
train in turn, in runs of their own one after the other: what share of the shorter of the two is hidden by the longer.
Writes benchmarks/results/rollout.json. Needs SGLang's environment (tools/setup_sglang_env.sh).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from common.machine import describe_machine
from common.words import save_tokenizer
from torch.distributed import ProcessGroupGloo, TCPStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import NamedTensor, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.servers.launch import STUBS, make_launch
from gtpo_megatron.rollout.sglang.weights.transfer import Method
from gtpo_megatron.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SMOLLM2_135M = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, tie_word_embeddings=True
)
# whose steps are long enough to time, and short enough to repeat
SMALL = SMOLLM2_135M | dict(num_hidden_layers=8)
HEADS = {
    64: dict(num_attention_heads=4, num_key_value_heads=2),
    576: dict(num_attention_heads=9, num_key_value_heads=3),
}
TURNS = 3
STEPS, UNCOUNTED = 8, 2  # of the runs that train; the first steps start servers' caches and the first batch
PROMPT_TOKENS, OUTPUT_TOKENS, COMPLETIONS, CONCURRENCY = 64, 128, 256, 64


def make_checkpoint(directory: Path, sizes: dict[str, Any], eos: str | None = None) -> PreTrainedModel:
    """A random Llama; without `eos`, which a trainer asks for, every completion has the length asked for."""
    config = AutoConfig.for_model(
        "llama",
        **sizes,
        **HEADS[sizes["hidden_size"]],
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    save_tokenizer(directory, sizes["vocab_size"], eos)
    return model


def by_engine(engine: SGLangEngine) -> float:
    """Output tokens per second of one generate, groups of 8."""
    generator = torch.Generator().manual_seed(time.monotonic_ns() & 0xFFFF)
    prompts = torch.randint(1, TINY["vocab_size"], (COMPLETIONS, PROMPT_TOKENS), generator=generator).tolist()
    requests = [PromptRequest(i, tuple(prompt), i) for i, prompt in enumerate(prompts)]
    begun = time.perf_counter()
    groups = list(engine.generate(requests, SamplingParams(1, OUTPUT_TOKENS)))
    seconds = time.perf_counter() - begun
    tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
    assert tokens == COMPLETIONS * OUTPUT_TOKENS
    return tokens / seconds


def by_sglang(python: str, url: str, checkpoint: Path, directory: Path) -> float:
    """Output tokens per second by SGLang's own benchmark, logprobs included."""
    # Its imports want a data set library that random prompts never use.
    (directory / "datasets.py").write_text(
        "def load_dataset(*args, **kwargs):\n    raise NotImplementedError\n"
    )
    out = directory / "bench.jsonl"
    out.unlink(missing_ok=True)
    command = [python, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", str(checkpoint), "--dataset-name", "random-ids", "--random-range-ratio", "1.0"]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)]
    command += ["--num-prompts", str(COMPLETIONS), "--max-concurrency", str(CONCURRENCY), "--disable-stream"]
    command += ["--temperature", "1", "--return-logprob", "--tokenize-prompt", "--output-file", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{STUBS}:{directory}", "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"sglang.bench_serving failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return float(json.loads(out.read_text().splitlines()[-1])["output_throughput"])


def throughput(python: str, directory: Path) -> dict[str, Any]:
    """Tokens per second of both clients, and the median ratio."""
    checkpoint = directory / "tiny"
    model = make_checkpoint(checkpoint, TINY)
    config = SGLangConfig(python=python, concurrency=CONCURRENCY, args=("--max-total-tokens", "32768"))
    engine = SGLangEngine(config, str(checkpoint), "fp32", directory / "logs", "cpu")
    try:
        engine.update_weights(model.state_dict().items(), 0)
        by_engine(engine)  # warm
        url = next(iter(engine.status()))
        turns = [(by_engine(engine), by_sglang(python, url, checkpoint, directory)) for _ in range(TURNS)]
    finally:
        engine.close()
    return {
        "tokens_per_s": [round(ours) for ours, _ in turns],
        "bench_serving_tokens_per_s": [round(theirs) for _, theirs in turns],
        "ratio": round(statistics.median(ours / theirs for ours, theirs in turns), 3),
    }


def timed(function: Callable[[], None]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def transfer(python: str, directory: Path) -> dict[str, Any]:
    """Seconds of each way after two updates (which make the process group and touch memory), and of the broadcasts."""
    checkpoint = directory / "smollm2-135m-shapes"
    state = make_checkpoint(checkpoint, SMOLLM2_135M).state_dict()
    weights = [(name, tensor) for name, tensor in state.items() if name != "lm_head.weight"]  # tied
    size = sum(tensor.nbytes for _, tensor in weights)
    found: dict[str, Any] = {"bytes": size}
    launch = make_launch(SGLangConfig(python=python), str(checkpoint), "fp32", "cpu", directory / "logs")
    process, url = launch.server(0)
    try:
        with PlainBroadcast(size) as peer:
            for method, turns in (("distributed", 9), ("disk", 5), ("tensor", 2)):
                rows = [
                    (seconds, peer.seconds(), peer.seconds())
                    for seconds in update_seconds(url, method, checkpoint, weights, directory, turns)
                ]
                ours, fresh, known = (statistics.median(column) for column in zip(*rows, strict=True))
                found[method] = {"s": ours, "gloo_to_fresh_memory_s": fresh, "gloo_to_used_memory_s": known}
                found[method] |= {"ratio_fresh": statistics.median(a / b for a, b, _ in rows)}
                found[method] |= {"ratio_used": statistics.median(a / b for a, _, b in rows)}
    finally:
        process.end()
    return found


def update_seconds(
    url: str,
    method: Method,
    checkpoint: Path,
    weights: list[NamedTensor],
    directory: Path,
    turns: int,
) -> Iterator[float]:
    """Seconds of successive updates of a server, measured when the next is asked for."""
    config = SGLangConfig(urls=(url,), weight_transfer=method, bucket_mb=128)
    engine = SGLangEngine(config, str(checkpoint), "fp32", directory / "weights", "cpu")
    try:
        while "down" in engine.status().values():  # it is starting
            time.sleep(0.5)
        for version in range(2 + turns):
            seconds = timed(lambda v=version: engine.update_weights(weights, v))
            if version >= 2:
                yield seconds
    finally:
        engine.close()


class PlainBroadcast:
    """Broadcasts of `size` bytes over gloo to one other process, which is ready when the constructor returns.

    The other receives in turns into memory that it has just allocated, as a server does for every bucket, and into
    memory that it has received into before.
    """

    def __init__(self, size: int) -> None:
        store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        command = [sys.executable, __file__, "--receive", str(store.port), str(size)]
        self._other = subprocess.Popen(command)
        self._flat = torch.zeros(size, dtype=torch.uint8)
        self._group = ProcessGroupGloo(store, 0, 2, timeout=timedelta(seconds=600))
        for _ in range(2):  # connects, and touches the memory
            self.seconds()

    def seconds(self) -> float:
        """Of one broadcast until the other process has it."""
        self._group.barrier().wait()
        return timed(self._once)

    def _once(self) -> None:
        self._group.broadcast(self._flat, 0).wait()
        self._group.barrier().wait()

    def __enter__(self) -> "PlainBroadcast":
        return self

    def __exit__(self, *_: object) -> None:
        self._other.kill()
        self._other.wait()


def receive(port: int, size: int) -> None:
    """The other process of `PlainBroadcast`."""
    store = TCPStore("127.0.0.1", port, 2, is_master=False)
    used = torch.empty(size, dtype=torch.uint8)
    group = ProcessGroupGloo(store, 1, 2, timeout=timedelta(seconds=600))
    for round_ in itertools.count():
        group.barrier().wait()
        flat = used if round_ % 2 else torch.empty(size, dtype=torch.uint8)
        group.broadcast(flat, 0).wait()
        group.barrier().wait()


def overlap(python: str, directory: Path) -> dict[str, Any]:
    """Seconds of a step's parts in turn and of a step with sampling beside training; the share of the shorter hidden."""
    make_checkpoint(directory / "small", SMALL, eos="t1")
    data = directory / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"t{i} t{i + 1}", "answer": "1"}) + "\n" for i in range(99))
    )
    in_turn, beside = (training_rows(python, directory, data, staleness) for staleness in (0, 1))
    sampling = statistics.median(row["seconds/rollout"] for row in in_turn)
    training = statistics.median(row["seconds/training"] for row in in_turn)
    steps = [step_seconds(rows) for rows in (in_turn, beside)]
    return {
        "sampling_s": sampling,
        "training_s": training,
        "step_in_turn_s": steps[0],
        "step_overlapped_s": steps[1],
        "training_overlapped_s": statistics.median(row["seconds/training"] for row in beside),
        "share_hidden": (steps[0] - steps[1]) / min(sampling, training),
    }


def step_seconds(rows: list[dict[str, Any]]) -> float:
    """The mean time of a step from its end to the next one's."""
    return (rows[-1]["time"] - rows[0]["time"]) / (len(rows) - 1)


def training_rows(python: str, directory: Path, data: Path, staleness: int) -> list[dict[str, Any]]:
    """The metrics of the steady steps of a run. Trainer and server have a thread each."""
    settings = {
        "name": f"staleness-{staleness}",
        "dir": str(directory),
        "model": {"path": str(directory / "small"), "dtype": "fp32"},
        "data": {"path": str(data), "format": "fields", "chat": False, "max_prompt_tokens": 64},
        "training": {"steps": STEPS, "micro_batch_tokens": 512},
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 4,
            "group_size": 4,
            "max_new_tokens": 64,
            "staleness": staleness,
            "sglang": {"python": python, "verify_every": 0},
        },
        "algorithm": {"importance": {"level": "token"}},
        "rewards": {
            "workers": 1,
            "terms": [{"kind": "python", "function": "tests.chaos_reward:different_characters"}],
        },
        "checkpoint": {"every": 0, "export_hf": False},
        "logging": {"tensorboard": False, "progress": "off"},
    }
    recipe = directory / f"staleness-{staleness}.yaml"
    recipe.write_text(json.dumps(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gtpo_megatron", "train", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return read_metrics(directory / f"staleness-{staleness}" / "metrics.jsonl")[UNCOUNTED:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), help="SGLang's interpreter"
    )
    parser.add_argument("--receive", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    arguments = parser.parse_args()
    if arguments.receive:
        return receive(*arguments.receive)
    out = RESULTS / "rollout.json"
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as directory:
            results[part] = {"machine": describe_machine(), **PARTS[part](arguments.python, Path(directory))}
        print(part, json.dumps(results[part], indent=2))
        out.write_text(json.dumps(results, indent=2) + "\n")


PARTS = {"throughput": throughput, "transfer": transfer, "overlap": overlap}


if __name__ == "__main__":
    main()
