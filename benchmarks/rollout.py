"""Rollouts from a real SGLang server on this machine's CPU: the client against SGLang's own benchmark, and weight transfer.

    python benchmarks/rollout.py

`throughput`: completions of equal lengths at equal concurrency from one server with a tiny model (which makes the
client's share of the work as large as it can be), by SGLangEngine and by `sglang.bench_serving`, in turns (A B A B ...);
the median of the ratios of successive turns is reported. `transfer`: seconds of `update_weights` by each way, for
weights of SmolLM2-135M's shapes in float32, against a broadcast of as many bytes between two processes over gloo.
Writes benchmarks/results/rollout.json. Needs SGLang's environment (tools/setup_sglang_env.sh).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import NamedTensor, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.servers import STUBS, make_launch
from gtpo_megatron.rollout.sglang.weights import Method

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SMOLLM2_135M = dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
HEADS = {
    64: dict(num_attention_heads=4, num_key_value_heads=2),
    576: dict(num_attention_heads=9, num_key_value_heads=3),
}
PROMPT_TOKENS, OUTPUT_TOKENS, COMPLETIONS, CONCURRENCY, TURNS = 64, 128, 256, 64, 3


def make_checkpoint(directory: Path, sizes: dict[str, int]) -> PreTrainedModel:
    """A random Llama without an end-of-turn token, so that every completion has the length asked for."""
    from tokenizers import Tokenizer, models

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
    vocabulary = {f"t{i}": i for i in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)
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
    """Seconds of each way, and of the plain broadcast; medians of three after a first one that also makes the group."""
    checkpoint = directory / "smollm2-135m-shapes"
    weights = [(k, v) for k, v in make_checkpoint(checkpoint, SMOLLM2_135M).state_dict().items()]
    size = sum(tensor.nbytes for _, tensor in weights)
    found: dict[str, Any] = {
        "bytes": size,
        "gloo_s": statistics.median(broadcast_seconds(size) for _ in range(3)),
    }
    launch = make_launch(SGLangConfig(python=python), str(checkpoint), "fp32", "cpu", directory / "logs")
    process, url = launch.server(0)
    try:
        for method in ("distributed", "tensor", "disk"):
            first, *rest = update_seconds(url, method, checkpoint, weights, directory / "weights")
            found[method] = {"first_s": first, "s": statistics.median(rest)}
            found[method]["ratio"] = found[method]["s"] / found["gloo_s"]
    finally:
        process.end()
    return found


def update_seconds(
    url: str, method: Method, checkpoint: Path, weights: list[NamedTensor], directory: Path
) -> list[float]:
    """Seconds of four successive updates of a server."""
    config = SGLangConfig(urls=(url,), weight_transfer=method, bucket_mb=128)
    engine = SGLangEngine(config, str(checkpoint), "fp32", directory, "cpu")
    try:
        while "down" in engine.status().values():  # it is starting
            time.sleep(0.5)
        return [timed(lambda v=version: engine.update_weights(weights, v)) for version in range(4)]
    finally:
        engine.close()


def broadcast_seconds(size: int) -> float:
    """Seconds of one gloo broadcast of `size` bytes to one other process."""
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    other = subprocess.Popen([sys.executable, __file__, "--receive", str(store.port), str(size)])
    flat = torch.zeros(size, dtype=torch.uint8)
    group = ProcessGroupGloo(store, 0, 2, timeout=timedelta(seconds=120))
    group.barrier().wait()

    def broadcast() -> None:
        group.broadcast(flat, 0).wait()
        group.barrier().wait()

    seconds = timed(broadcast)
    other.wait()
    return seconds


def receive(port: int, size: int) -> None:
    """The other process of `broadcast_seconds`."""
    store = TCPStore("127.0.0.1", port, 2, is_master=False)
    flat = torch.empty(size, dtype=torch.uint8)
    group = ProcessGroupGloo(store, 1, 2, timeout=timedelta(seconds=120))
    group.barrier().wait()
    group.broadcast(flat, 0).wait()
    group.barrier().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), help="SGLang's interpreter"
    )
    parser.add_argument("--receive", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        return receive(*arguments.receive)
    with tempfile.TemporaryDirectory() as directory:
        results = {
            "machine": {
                "cpus": os.cpu_count(),
                "load": os.getloadavg()[0],
                "python": platform.python_version(),
            },
            "throughput": throughput(arguments.python, Path(directory)),
            "transfer": transfer(arguments.python, Path(directory)),
        }
    print(json.dumps(results, indent=2))
    (RESULTS / "rollout.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
