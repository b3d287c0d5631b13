"""Completions from a fleet of servers: requests, repeats, interruptions, and what is kept of unfinished groups.

All of this runs in the event loop of the servers; what it finishes goes to the caller through a job's queue.
"""

import asyncio
import queue
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Completion, Group, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang.client import Client, Sample, ServerFault
from gtpo_megatron.rollout.sglang.servers.fleet import Fleet
from gtpo_megatron.rollout.sglang.servers.states import Worker
from gtpo_megatron.trajectories.record import FinishReason

ABORT_GRACE_S = 5.0
SURVEY_S = 30.0


@dataclass(eq=False)
class Draft:
    """A completion on its way: the answers so far, each with the weight version that sampled it."""

    parts: list[tuple[Sample, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        return [token for sample, _ in self.parts for token in sample.token_ids.tolist()]

    def finish(self) -> Completion:
        assert self.finish_reason is not None
        samples = [sample for sample, _ in self.parts]
        versions = [np.full(len(sample.token_ids), version, np.int32) for sample, version in self.parts]
        return Completion(
            np.concatenate([sample.token_ids for sample in samples]),
            np.concatenate([sample.logprobs for sample in samples]),
            np.concatenate(versions),
            self.finish_reason,
            self.seconds,
        )


@dataclass(eq=False)
class Flight:
    """A group under way."""

    drafts: list[Draft]
    worker: Worker | None = None  # the group's last, preferred for its next: it has the prompt in its cache
    # what is on a server now, by request id
    requests: dict[str, tuple[Worker, asyncio.Task[Any]]] = field(default_factory=dict)
    timeouts: int = 0


@dataclass(eq=False)
class Job:
    """One call of generate: its groups on the way to the caller. None in `out`: no more will come."""

    params: SamplingParams
    out: queue.SimpleQueue[Group | BaseException | None] = field(default_factory=queue.SimpleQueue)
    task: Future[None] | None = None
    flights: dict[PromptRequest, Flight] = field(default_factory=dict)  # of the groups not handed out yet
    leaving: bool = False  # the caller has what it wants


class Sampler:
    """Samples the groups of jobs. With `config.partial` it keeps what is unfinished, for the next group of its prompt."""

    def __init__(self, fleet: Fleet, client: Client, config: SGLangConfig, attempts: int) -> None:
        self._fleet, self._client, self._config, self._attempts = fleet, client, config, attempts
        self._survey: asyncio.Task[bool] | None = None  # of the weights that servers hold
        # groups that were left unfinished; any of the same prompt may go on with one
        self._kept: dict[tuple[tuple[int, ...], SamplingParams], list[list[Draft]]] = {}

    async def keep_unfinished(self, job: Job) -> None:
        """Take back what is under way with the tokens that it has, for the next group of the same prompt."""
        job.leaving = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ABORT_GRACE_S
        while loop.time() < deadline:
            late = [(rid, w) for f in job.flights.values() for rid, (w, _) in f.requests.items()]
            if not late:
                break
            await asyncio.gather(*(self._abort(rid, worker) for rid, worker in late))
            await asyncio.sleep(0.05)  # again: a request may have reached the server after its abort
        for request, flight in job.flights.items():
            if any(draft.parts for draft in flight.drafts):
                self._kept.setdefault((request.prompt_ids, job.params), []).append(flight.drafts)

    def _drafts(self, request: PromptRequest, params: SamplingParams) -> list[Draft]:
        kept = self._kept.get((request.prompt_ids, params))
        if not kept:
            return [Draft() for _ in range(params.n)]
        drafts = kept.pop(0)
        if not kept:
            del self._kept[request.prompt_ids, params]
        return drafts

    async def sample_all(self, job: Job, requests: Sequence[PromptRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(self._sample_group(job, request))
        except BaseExceptionGroup as group:
            job.out.put(_first(group))
        finally:
            job.out.put(None)

    async def _sample_group(self, job: Job, request: PromptRequest) -> None:
        flight = job.flights[request] = Flight(self._drafts(request, job.params))
        timer = None
        if self._config.group_timeout_s is not None:
            timer = asyncio.create_task(self._time_out(flight, self._config.group_timeout_s))
        try:
            async with asyncio.TaskGroup() as tasks:
                for draft in flight.drafts:
                    tasks.create_task(self._complete(job, flight, draft, request))
        finally:
            if timer is not None:
                timer.cancel()
        if not job.leaving:
            job.out.put(Group(request, tuple(draft.finish() for draft in flight.drafts)))

    async def _time_out(self, flight: Flight, limit_s: float) -> None:
        """Abort what of a group is under way when its time is up; it goes on, or begins anew, with twice the time."""
        while True:
            await asyncio.sleep(limit_s)
            limit_s *= 2
            flight.timeouts += 1
            flight.worker = None
            late = dict(flight.requests)
            await asyncio.gather(*(self._abort(rid, worker) for rid, (worker, _) in late.items()))
            await asyncio.sleep(ABORT_GRACE_S)
            for rid, (_, task) in late.items():
                if rid in flight.requests:
                    task.cancel()  # a server that does not even abort: `Fleet.run` turns this into a fault

    async def _complete(self, job: Job, flight: Flight, draft: Draft, request: PromptRequest) -> None:
        """Finish one completion, over as many requests as faults and interruptions make of it."""
        begun = time.monotonic()
        failures: list[str] = []
        while draft.finish_reason is None and not job.leaving:
            tokens = draft.token_ids
            left = job.params.max_new_tokens - len(tokens)
            if left == 0:
                draft.finish_reason = "length"
                break
            worker = await self._fleet.acquire(flight.worker, first=bool(tokens or failures))
            if job.leaving:
                self._fleet.release(worker)
                break
            flight.worker = worker
            tag, version, timeouts = self._fleet.tag, _number(self._fleet.tag), flight.timeouts
            try:
                sample = await self._request(flight, worker, [*request.prompt_ids, *tokens], job.params, left)
            except ServerFault as fault:
                self._count_failure(failures, str(fault), request)
                continue
            if {*sample.versions, sample.weight_version} != {tag}:
                if not await self._take_out_outdated(worker, sample.weight_version):
                    wrong = (
                        f"answered with the weights {sample.weight_version}, which no server says it holds"
                    )
                    self._count_failure(failures, wrong, request)
                continue
            if sample.finish_reason != "abort":
                draft.finish_reason = sample.finish_reason
            elif (
                self._fleet.gate_open
                and self._fleet.tag == tag
                and flight.timeouts == timeouts
                and not job.leaving
            ):
                self._count_failure(failures, f"{worker.url} aborted the request unasked", request)
            if draft.finish_reason is not None or (self._config.partial and len(sample.token_ids)):
                draft.parts.append((sample, version))
        draft.seconds += time.monotonic() - begun

    async def _take_out_outdated(self, worker: Worker, held: str) -> bool:
        """Take out the server that answered with other weights; whether it was found.

        A router does not say who answered: all are asked, once for all such answers that come meanwhile.
        """
        if not self._config.router:
            self._fleet.outdated(worker, held)
            return True
        if self._survey is None or self._survey.done():
            self._survey = asyncio.create_task(self._take_out_who_holds_others())
        return await asyncio.shield(self._survey)

    async def _take_out_who_holds_others(self) -> bool:
        ready = self._fleet.ready
        asked = (self._client.weight_version(worker.url, SURVEY_S) for worker in ready)
        answers = zip(ready, await asyncio.gather(*asked, return_exceptions=True), strict=True)
        others = {w: held for w, held in answers if isinstance(held, str) and held != self._fleet.tag}
        for worker, held in others.items():
            self._fleet.outdated(worker, held)
        if not others:
            await asyncio.sleep(0.5)  # it may have been taken out since, and the router is not told yet
        return bool(others)

    def _count_failure(self, failures: list[str], failure: str, request: PromptRequest) -> None:
        failures.append(failure)
        if len(failures) >= self._attempts:
            raise UserError(
                f"group {request.group}: a completion failed {len(failures)} times; the last answers:\n"
                + "\n".join(failures[-3:])
            )

    async def _request(
        self, flight: Flight, worker: Worker, prompt_ids: list[int], params: SamplingParams, left: int
    ) -> Sample:
        rid = uuid.uuid4().hex

        async def send(url: str) -> Sample:
            task = asyncio.current_task()
            assert task is not None
            flight.requests[rid] = (worker, task)
            return await self._client.generate(url, prompt_ids, params, left, rid)

        try:
            return await self._fleet.run(worker, send)
        except asyncio.CancelledError:
            # Nobody waits for it any more: do not let it take the server's time.
            asyncio.get_running_loop().create_task(self._abort(rid, worker))
            raise
        finally:
            flight.requests.pop(rid, None)

    async def _abort(self, rid: str, worker: Worker) -> None:
        urls = [w.url for w in self._fleet.ready] if self._config.router else [worker.url]
        await asyncio.gather(*(self._client.abort(url, rid) for url in urls), return_exceptions=True)


def _number(tag: str | None) -> int:
    return int(str(tag).rsplit(":", 1)[1])


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
