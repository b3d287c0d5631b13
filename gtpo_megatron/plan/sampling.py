"""Seconds of sampling: what a server takes for a prompt and for a step of decoding, and a batch whose longest completions decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log2
from statistics import NormalDist

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import GPU, Efficiency, Model

BYTES = 2  # of a cached element and of what ranks exchange, bf16
STRIDE = 8  # decoding steps that are taken at once
MOST = 4096  # completions of one server that are followed one by one


@dataclass(frozen=True)
class Server:
    """One server of `tensor` GPUs."""

    model: Model
    gpu: GPU
    tensor: int
    weight_bytes: int = 2  # of a weight: 1 in FP8
    memory_share: float = (
        0.88  # of a GPU for weights and cache: SGLang's --mem-fraction-static, by default about this
    )

    @property
    def weights(self) -> float:
        """Bytes on a GPU."""
        return self.model.parameters * self.weight_bytes / self.tensor

    @property
    def token_cache(self) -> float:
        """Bytes on a GPU of a cached token; a latent cache is on every rank."""
        ranks = 1 if self.model.mla else min(self.tensor, self.model.kv_heads)
        return self.model.cache_elements * BYTES / ranks

    @property
    def cache(self) -> float:
        """Bytes on a GPU for cached tokens; not positive if not even the weights fit."""
        return self.gpu.memory * self.memory_share - self.weights

    @property
    def cached_tokens(self) -> float:
        """Tokens that fit into the cache."""
        return self.cache / self.token_cache


def decode_seconds(server: Server, running: float, context: float, reached: Efficiency) -> float:
    """One token for each of `running` sequences of that length on average."""
    model, gpu = server.model, server.gpu
    touched = 1 - (1 - model.experts_per_token / model.experts) ** running if model.experts else 0
    read = model.dense_parameters + model.head_parameters + touched * model.expert_parameters
    moved = read * server.weight_bytes / server.tensor + running * context * server.token_cache
    active = model.dense_parameters + model.active_expert_parameters + model.head_parameters
    work = 2 * active * running / server.tensor / (gpu.bf16 * gpu.power * reached.prefill_matmul)
    latency = reached.all_reduce_us if server.tensor <= gpu.node else reached.all_reduce_network_us
    waits = reached.decode_layer_us + 2 * latency * log2(server.tensor)
    return (
        max(moved / (gpu.bandwidth * reached.decode_memory), work)
        + model.layers * waits * 1e-6
        + reached.decode_base_ms * 1e-3
    )


def prefill_seconds(server: Server, tokens: float, reached: Efficiency) -> float:
    """A prompt: a forward pass without the head, and two all-reduces a layer that nothing hides."""
    model, gpu, size = server.model, server.gpu, server.tensor
    scores = 2 * model.layers * (model.query_width + model.value_width) * model.visible(tokens)
    weights = 2 * (model.dense_parameters + model.active_expert_parameters)
    fast = gpu.bf16 * gpu.power * size
    compute = tokens * (weights / (fast * reached.prefill_matmul) + scores / (fast * reached.attention))
    link = gpu.nvlink * reached.nvlink if size <= gpu.node else gpu.network * reached.network
    volume = 2 * model.layers * tokens * model.hidden * BYTES * 2 * (size - 1) / size
    return compute + volume / link


def served_tokens_per_second(
    server: Server, prompt: int, completion: int, concurrency: int, reached: Efficiency
) -> float:
    """Output tokens/s of a server that always has `concurrency` requests of one shape; those beyond its cache wait."""
    running = min(concurrency, server.cached_tokens / (prompt + completion))
    step = decode_seconds(server, running, prompt + completion / 2, reached)
    return running * completion / (running * prefill_seconds(server, prompt, reached) + completion * step)


def sampling_seconds(
    server: Server, prompt: float, lengths: Sequence[float], concurrency: int, reached: Efficiency
) -> float:
    """A batch of completions on one server, all asked for at once: until the last is done, however few still run.

    `lengths` are tokens of the completions. Raises UserError if the weights leave no room for the longest.
    """
    room = server.cached_tokens
    if room < prompt + max(lengths):
        raise UserError(
            f"a server of {server.tensor} {server.gpu.name} has room for {max(0, int(room)):,} tokens beside the weights, "
            f"fewer than the longest sequence of {prompt + max(lengths):,.0f}: raise rollout.sglang.tensor"
        )
    waiting = list(lengths)[::-1]
    running: list[list[float]] = []  # [done, wanted]
    seconds, cached = 0.0, 0.0
    while waiting or running:
        while (
            waiting and len(running) < concurrency and (not running or cached + prompt + waiting[-1] <= room)
        ):
            wanted = waiting.pop()
            running.append([0.0, wanted])
            cached += prompt + wanted
            seconds += prefill_seconds(server, prompt, reached)
        steps = min(STRIDE, max(wanted - done for done, wanted in running))
        context = prompt + sum(done for done, _ in running) / len(running)
        seconds += steps * reached.rl_decode * decode_seconds(server, len(running), context, reached)
        for sequence in running:
            sequence[0] += steps
        cached -= sum(prompt + wanted for done, wanted in running if done >= wanted)
        running = [sequence for sequence in running if sequence[0] < sequence[1]]
    return seconds


def batch_seconds(
    server: Server, prompt: float, lengths: Sequence[float], count: int, concurrency: int, reached: Efficiency
) -> float:
    """`sampling_seconds` of `count` completions on a server, whose lengths are spread as those given (any number of them)."""
    followed = min(count, MOST)
    share = share_of_server(lengths, followed)
    return sampling_seconds(server, prompt, share, concurrency, reached) * count / followed


def spread_lengths(mean: float, longest: int, count: int, spread: float = 0.7) -> list[float]:
    """Lengths of `count` completions where only the mean and the limit are known: quantiles of a log-normal, cut at the limit.

    `spread` is the standard deviation of the logarithm. The mean after the cut is `mean`, which must lie below `longest`.
    """
    normal = NormalDist()
    shape = [exp(spread * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, 1e4 * longest
    for _ in range(80):
        median = (low + high) / 2
        if sum(min(longest, median * x) for x in shape) / count < mean:
            low = median
        else:
            high = median
    return [max(1.0, min(longest, low * x)) for x in shape]


def share_of_server(lengths: Sequence[float], count: int) -> list[float]:
    """`count` lengths that stand for a server's part of the batch: evenly through the sorted lengths, the longest among them.

    Shuffled by a fixed rule, so that the order in which they are asked for says nothing of their length.
    """
    ordered = sorted(lengths)
    last = len(ordered) - 1
    part = [ordered[round(last * (i + 1) / count)] for i in range(count)]
    return [part[i * 7919 % count] for i in range(count)] if count % 7919 else part
