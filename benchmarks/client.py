"""Rank 0 as a client of many servers: processor time a completion, with thousands in flight on hundreds of servers.

    python benchmarks/client.py [--servers 256] [--in-flight 8192] [--tokens 256]

The servers are ports of one other process that answers with completions made beforehand (common/scripted_servers.py).
The peer sends bodies like them by aiohttp to the same servers in turn, and decodes the JSON of the answers: what any client in
Python pays. In turns (A B A B ...); the median of the ratios of successive turns is reported, and the share of one core that a thousand
completions a second would take. Writes benchmarks/results/client.json.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from common.machine import describe_machine

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.sockets import allowed_sockets

RESULTS = Path(__file__).parent / "results"
SERVERS = Path(__file__).parent / "common" / "scripted_servers.py"
GROUP, PROMPT_TOKENS, VOCABULARY, TURNS, ANSWER_S = 16, 64, 512, 3, 4.0


def requests_of(completions: int) -> list[PromptRequest]:
    generator = torch.Generator().manual_seed(0)
    shape = (completions // GROUP, PROMPT_TOKENS)
    prompts = torch.randint(1, VOCABULARY, shape, generator=generator).tolist()
    return [PromptRequest(index, tuple(prompt), index) for index, prompt in enumerate(prompts)]


def by_engine(engine: SGLangEngine, requests: Sequence[PromptRequest], tokens: int) -> None:
    sampled = 0
    for group in engine.generate(requests, SamplingParams(GROUP, tokens)):
        sampled += sum(len(completion.token_ids) for completion in group.completions)
    assert sampled == len(requests) * GROUP * tokens


def by_aiohttp(urls: Sequence[str], requests: Sequence[PromptRequest], tokens: int) -> None:
    """Bodies like the engine's, as many at once, without anything else."""

    async def one(session: aiohttp.ClientSession, url: str, request: PromptRequest, rid: str) -> int:
        body = {"rid": rid, "input_ids": list(request.prompt_ids), "return_logprob": True}
        body["sampling_params"] = {"max_new_tokens": tokens, "temperature": 1.0}
        async with session.post(f"{url}/generate", json=body) as answer:
            return len(json.loads(await answer.read())["output_ids"])

    async def all_of_them() -> int:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            completions = enumerate(request for request in requests for _ in range(GROUP))
            sent = (one(session, urls[i % len(urls)], request, f"{i:032x}") for i, request in completions)
            return sum(await asyncio.gather(*sent))

    assert asyncio.run(all_of_them()) == len(requests) * GROUP * tokens


def cost(action: Callable[[], None]) -> tuple[float, float]:
    """Processor seconds of this process, all threads; seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(urls: Sequence[str], in_flight: int, tokens: int, directory: Path) -> dict[str, Any]:
    section = SGLangConfig(
        urls=tuple(urls), concurrency=-(-in_flight // len(urls)), checksums="never", weight_transfer="tensor"
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    engine = SGLangEngine(section, str(directory), "fp32", directory)
    requests = requests_of(in_flight)
    ours, peers = [], []
    try:
        engine.update_weights([("weight", torch.zeros(4))], 0)
        for _ in range(TURNS):
            ours.append(cost(lambda: by_engine(engine, requests, tokens)))
            peers.append(cost(lambda: by_aiohttp(urls, requests, tokens)))
    finally:
        engine.close()
    mine = statistics.median(cpu for cpu, _ in ours) / in_flight
    return {
        "servers": len(urls),
        "completions_in_flight": in_flight,
        "tokens_each": tokens,
        "cpu_ms_per_completion": 1e3 * mine,
        "core_share_at_1000_completions_a_second": 1e3 * mine,
        "cpu_over_aiohttp": statistics.median(a / b for (a, _), (b, _) in zip(ours, peers, strict=True)),
        "seconds": statistics.median(wall for _, wall in ours),
        "seconds_of_aiohttp": statistics.median(wall for _, wall in peers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--output", type=Path, default=RESULTS / "client.json")
    arguments = parser.parse_args()
    allowed_sockets()  # of the peer as well
    found = []
    for tokens in arguments.tokens:
        command = [sys.executable, str(SERVERS), str(arguments.servers), str(tokens), str(ANSWER_S)]
        with (
            tempfile.TemporaryDirectory() as directory,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as servers,
        ):
            try:
                assert servers.stdout is not None
                urls = [f"http://127.0.0.1:{port}" for port in json.loads(servers.stdout.readline())]
                found.append(measure(urls, arguments.in_flight, tokens, Path(directory)))
            finally:
                servers.terminate()
        print(json.dumps(found[-1], indent=2))
    result = {"machine": describe_machine(), "cases": found}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
