"""Questions put to every server of a run: which weights do you hold, which logprobs do you give these tokens?

A server that fails meanwhile is examined, and asked again when it is back; one that is lost is left out. So what comes
out says something about the servers' weights, never about their health.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.client import Refused, ServerFault
from gtpo_megatron.rollout.sglang.servers.pool import Pool
from gtpo_megatron.rollout.sglang.servers.states import Worker
from gtpo_megatron.rollout.sglang.weights.verify import differing_tensors

T = TypeVar("T")
Answers = dict[str, T | ServerFault | Refused]  # by URL


async def differences(pool: Pool, checkpoint: Path) -> dict[str, str]:
    """By URL, how each server's weights differ from those of a checkpoint on disk; "" where they do not.

    Raises:
        UserError: a server cannot read the checkpoint, none is left, or some failed again and again.
    """

    async def compare(worker: Worker) -> str:
        try:
            patience = pool.timing.transfer_s, pool.timing.control_s
            names = await differing_tensors(
                pool.client, worker.url, str(checkpoint), str(pool.fleet.tag), *patience
            )
        except Refused as refusal:
            raise Refused(
                "a server cannot load the weights to compare with its own (rollout.sglang.checksums needs servers that "
                f"see the run's directory): {refusal}"
            ) from refusal
        return f"{len(names)} tensors differ: {', '.join(names[:8])}" if names else ""

    async def compare_all(workers: list[Worker]) -> Answers[str]:
        async with pool.updates.paused() as faults:
            workers = [worker for worker in workers if worker.state == "ready"]
            faults |= {worker.url: "was left in the middle of a comparison" for worker in workers}
            found = await _each(pool, workers, compare)
            faults |= {url: str(answer) for url, answer in found.items()}
        return found

    return await _of_every_server(pool, compare_all)


async def scores(
    pool: Pool, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, list[NDArray[np.float32]]]:
    """By URL, the logprobs [L] that each server gives each (prompt_ids, token_ids).

    Raises:
        UserError: a server refused, no server is left, or some failed again and again.
    """

    async def score(worker: Worker) -> list[NDArray[np.float32]]:
        calls = (pool.client.score(worker.url, prompt, tokens) for prompt, tokens in sequences)
        return list(await asyncio.gather(*calls))

    return await _of_every_server(pool, lambda workers: _each(pool, workers, score, pool.fleet.suspect))


async def _each(
    pool: Pool,
    workers: list[Worker],
    ask: Callable[[Worker], Coroutine[Any, Any, T]],
    on_fault: Callable[[Worker, str], None] | None = None,
) -> Answers[T]:
    """Ask all at once. Returns when all have answered, so that no question is still under way."""

    async def answer(worker: Worker) -> T | ServerFault | Refused:
        try:
            found = await pool.fleet.ask(worker, ask(worker), on_fault)
        except (ServerFault, Refused) as fault:
            return fault
        worker.faults = 0
        return found

    answers = await asyncio.gather(*map(answer, workers))
    return {worker.url: found for worker, found in zip(workers, answers, strict=True)}


async def _of_every_server(pool: Pool, ask: Callable[[list[Worker]], Awaitable[Answers[T]]]) -> dict[str, T]:
    """Put a question to all servers that are ready, and again to those that fail once they are ready again."""
    answers: dict[str, T] = {}
    fault = "none stayed ready"
    for _ in range(pool.timing.attempts):
        await pool.updates.wait_settled()
        faults = []
        for url, answer in (await ask([w for w in pool.fleet.ready if w.url not in answers])).items():
            if isinstance(answer, Refused):
                raise answer
            if isinstance(answer, ServerFault):
                faults.append(str(answer))
            else:
                answers[url] = answer
        if answers and not faults:
            return answers
        fault = faults[0] if faults else fault
    raise UserError(f"SGLang servers failed {pool.timing.attempts} times while they were asked: {fault}")
