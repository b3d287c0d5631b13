"""SGLangEngine: a rollout engine over SGLang servers, for rank 0 of the trainer."""

import asyncio
import atexit
import logging
import queue
import threading
import time
import uuid
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Completion, Group, NamedTensor, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang.buckets import Snapshot, pack
from gtpo_megatron.rollout.sglang.client import Client, Sample, ServerFault
from gtpo_megatron.rollout.sglang.pool import Pool, Timing, Worker
from gtpo_megatron.rollout.sglang.servers import Device, make_launch, resolve_key
from gtpo_megatron.rollout.sglang.survey import differences, scores
from gtpo_megatron.rollout.sglang.weights import Link, Transfer
from gtpo_megatron.trajectories.record import FinishReason

log = logging.getLogger(__name__)
T = TypeVar("T")
ABORT_GRACE_S = 5.0
DEFAULT_TIMING = Timing()


@dataclass(eq=False)
class _Draft:
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
class _Flight:
    """A group under way."""

    drafts: list[_Draft]
    worker: Worker | None = None  # the group's last, preferred for its next: it has the prompt in its cache
    # what is on a server now, by request id
    requests: dict[str, tuple[Worker, asyncio.Task[Any]]] = field(default_factory=dict)
    timeouts: int = 0


@dataclass(eq=False)
class _Job:
    """One call of generate: its groups on the way to the caller. None in `out`: no more will come."""

    params: SamplingParams
    out: queue.SimpleQueue[Group | BaseException | None] = field(default_factory=queue.SimpleQueue)
    task: Future[None] | None = None
    flights: dict[PromptRequest, _Flight] = field(default_factory=dict)  # of the groups not handed out yet
    leaving: bool = False  # the caller has what it wants


class SGLangEngine:
    """Samples from SGLang servers, given by URL or started here; see `RolloutEngine` for the contract.

    Every completion is one request of its own. A request that fails is sent elsewhere; an answer is used once. With
    `config.partial` completions that an update or `group_timeout_s` interrupts, or that the caller leaves unfinished,
    go on from their tokens (the last when their prompt is next asked for), each token with the version that sampled it;
    else they begin anew, so that a completion never mixes versions. Beginning anew makes long completions rarer than
    the policy makes them; `partial` does not.

    The constructor starts the servers and returns; the first `update_weights` waits for them.

    Args:
        config: the section rollout.sglang.
        model_path: the policy's Hugging Face checkpoint, readable where the servers run.
        dtype: of the servers' weights.
        log_dir: for the servers' logs; and, with weight_transfer: disk, for the weights.
        device: of servers started here; by default cuda where torch sees a GPU.
        timing: patience with servers.

    Raises:
        UserError: a configuration that cannot work; see `make_launch` and `read_urls`.
    """

    on_every_rank = False

    def __init__(
        self,
        config: SGLangConfig,
        model_path: str,
        dtype: Literal["bf16", "fp32"],
        log_dir: Path,
        device: Device | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.version = -1
        self.updates_in_flight = config.partial
        self._config = config
        self._timing = timing
        self._directory = Path(log_dir).absolute()
        self._vocabulary = int(AutoConfig.from_pretrained(model_path).get_text_config().vocab_size)
        # a server left over from another run never has this run's weights
        self._run_name = uuid.uuid4().hex[:8]
        self._jobs: set[_Job] = set()
        # groups that were left unfinished; any of the same prompt may go on with one
        self._kept: dict[tuple[tuple[int, ...], SamplingParams], list[list[_Draft]]] = {}
        self._started = self._closed = self._ended = False  # ended: samples no more
        launch = None
        if not config.given or config.router:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            launch = make_launch(config, model_path, dtype, device, self._directory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        atexit.register(self.close)

        async def make_pool() -> Pool:
            client = Client(resolve_key(config.api_key), config.request_timeout_s)
            pool = Pool(
                config,
                launch,
                client,
                Link(
                    client,
                    config.weight_transfer,
                    timing.control_s,
                    timing.transfer_s,
                    timing.collective_s,
                ),
                timing,
            )
            await pool.start()
            return pool

        try:
            self._pool = self._run(make_pool())
        except BaseException:
            self._stop_loop()
            raise

    # ------------------------------------------------------------------ weights

    def update_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Replace the weights on all servers. The next bucket is produced while the last one is sent.

        A server that fails on the way does not fail the update: it is brought to these weights later, from a copy kept
        in host memory (or on disk), before it is sampled from again.

        Raises:
            UserError: a server did not start, or none is left.
        """
        self._wait_started()
        tag = f"{self._run_name}:{version}"
        targets = self._run(self._pool.begin_update())
        # No server is brought to the old weights once an update has begun: their memory takes the new ones.
        memory = [bucket.flat for bucket in self._pool.snapshot.buckets] if self._pool.snapshot else []
        snapshot = Snapshot(
            version, self._directory / f"weights-{version}" if self._on_disk else None, memory
        )
        transfer = Transfer(self._pool.link, targets, tag)
        try:
            sent: Future[None] | None = None
            for bucket in pack(weights, self._config.bucket_mb << 20, memory):
                snapshot.add(bucket)
                if sent is not None:
                    sent.result()
                sent = self._submit(transfer.send(bucket))
            if sent is not None:
                sent.result()
            snapshot.finish()
            done = self._run(transfer.end(snapshot))
        except BaseException:
            self._call(self._pool.end_update, None, None, [], {})
            raise
        self._call(self._pool.end_update, tag, snapshot, done, transfer.faults)
        self._run(self._pool.wait_updated())
        self.version = version

    def verify_weights(self, weights: Iterable[NamedTensor]) -> None:
        """Compare every tensor that the servers hold with `weights`, which must be those of the last update.

        The servers load `weights` from files (so they must see `log_dir`) into tensors filled with noise, and compare
        the result with what they held: a tensor that the export lacks shows as well as one that arrived wrong.

        Raises:
            UserError: names the servers and tensors that differ; or no server is left.
        """
        directory = self._directory / f"verify-{uuid.uuid4().hex[:8]}"
        copy = Snapshot(self.version, directory)
        try:
            for bucket in pack(weights, self._config.bucket_mb << 20):
                copy.add(bucket)
            copy.finish()
            found = self._run(differences(self._pool, directory))
        finally:
            copy.delete()
        if wrong := [f"  {url}: {what}" for url, what in found.items() if what]:
            raise UserError(
                "\n".join([f"the weights of {len(wrong)} servers are not the trainer's:", *wrong])
            )
        log.info("the weights of %d SGLang servers are the trainer's, tensor by tensor", len(found))

    @property
    def _on_disk(self) -> bool:
        return self._config.weight_transfer == "disk"

    # ------------------------------------------------------------------ sampling

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        """Yield each group as it is finished. Leaving the iterator early aborts the rest, and with `partial` keeps it.

        Raises:
            UserError: no weights yet, a token id outside the vocabulary, a request that servers refuse or that failed
                on several, or no server left.
        """
        if self._pool.tag is None:
            raise UserError("SGLang servers have no weights of this run yet: call update_weights first")
        for request in requests:
            if (
                not request.prompt_ids
                or not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocabulary
            ):
                raise UserError(
                    f"prompt of group {request.group}: its token ids must be at least one, and from 0 to "
                    f"{self._vocabulary - 1} (an id outside the vocabulary ends a server)"
                )
        job = _Job(params)
        self._jobs.add(job)
        job.task = self._submit(self._sample_all(job, requests))
        if self._ended:  # looked at after the job is where abort_all sees it
            self._end(job)
        return self._groups(job)

    def abort_all(self, *, for_good: bool = False) -> None:
        """End every generate that is under way, and `for_good` later ones: their iterators stop after the finished groups."""
        self._ended = self._ended or for_good
        for job in list(self._jobs):
            self._end(job)

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> dict[str, list[NDArray[np.float32]]]:
        """For each server's URL, the logprobs [L] of each (prompt_ids, token_ids) under its weights.

        Raises:
            UserError: a server refused, or none is left.
        """
        return self._run(scores(self._pool, sequences))

    def _groups(self, job: _Job) -> Iterator[Group]:
        try:
            while (item := job.out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                del job.flights[item.request]
                yield item
        finally:
            if self._config.partial and job in self._jobs:
                self._run(self._keep_unfinished(job))
            self._end(job)

    def _end(self, job: _Job) -> None:
        self._jobs.discard(job)
        if job.task is not None:
            job.task.cancel()
        job.out.put(None)

    async def _keep_unfinished(self, job: _Job) -> None:
        """Take back what is under way with the tokens that it has, for the next group of the same prompt."""
        job.leaving = True
        deadline = self._loop.time() + ABORT_GRACE_S
        while self._loop.time() < deadline:
            late = [(rid, w) for f in job.flights.values() for rid, (w, _) in f.requests.items()]
            if not late:
                break
            await asyncio.gather(*(self._abort(rid, worker) for rid, worker in late))
            await asyncio.sleep(0.05)  # again: a request may have reached the server after its abort
        for request, flight in job.flights.items():
            if any(draft.parts for draft in flight.drafts):
                self._kept.setdefault((request.prompt_ids, job.params), []).append(flight.drafts)

    def _drafts(self, request: PromptRequest, params: SamplingParams) -> list[_Draft]:
        kept = self._kept.get((request.prompt_ids, params))
        if not kept:
            return [_Draft() for _ in range(params.n)]
        drafts = kept.pop(0)
        if not kept:
            del self._kept[request.prompt_ids, params]
        return drafts

    async def _sample_all(self, job: _Job, requests: Sequence[PromptRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(self._sample_group(job, request))
        except BaseExceptionGroup as group:
            job.out.put(_first(group))
        finally:
            job.out.put(None)

    async def _sample_group(self, job: _Job, request: PromptRequest) -> None:
        flight = job.flights[request] = _Flight(self._drafts(request, job.params))
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

    async def _time_out(self, flight: _Flight, limit_s: float) -> None:
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
                    task.cancel()  # a server that does not even abort: `Pool.run` turns this into a fault

    async def _complete(self, job: _Job, flight: _Flight, draft: _Draft, request: PromptRequest) -> None:
        """Finish one completion, over as many requests as faults and interruptions make of it."""
        begun = time.monotonic()
        failures: list[str] = []
        while draft.finish_reason is None and not job.leaving:
            tokens = draft.token_ids
            left = job.params.max_new_tokens - len(tokens)
            if left == 0:
                draft.finish_reason = "length"
                break
            worker = await self._pool.acquire(flight.worker, first=bool(tokens or failures))
            if job.leaving:
                self._pool.release(worker)
                break
            flight.worker = worker
            tag, version, timeouts = self._pool.tag, _number(self._pool.tag), flight.timeouts
            try:
                sample = await self._request(flight, worker, [*request.prompt_ids, *tokens], job.params, left)
            except ServerFault as fault:
                self._count_failure(failures, str(fault), request)
                continue
            if {*sample.versions, sample.weight_version} != {tag}:
                self._pool.outdated(worker, sample.weight_version)
                continue
            if sample.finish_reason != "abort":
                draft.finish_reason = sample.finish_reason
            elif (
                self._pool.gate_open
                and self._pool.tag == tag
                and flight.timeouts == timeouts
                and not job.leaving
            ):
                self._count_failure(failures, f"{worker.url} aborted the request unasked", request)
            if draft.finish_reason is not None or (self._config.partial and len(sample.token_ids)):
                draft.parts.append((sample, version))
        draft.seconds += time.monotonic() - begun

    def _count_failure(self, failures: list[str], failure: str, request: PromptRequest) -> None:
        failures.append(failure)
        if len(failures) >= self._timing.attempts:
            raise UserError(
                f"group {request.group}: a completion failed {len(failures)} times; the last answers:\n"
                + "\n".join(failures[-3:])
            )

    async def _request(
        self, flight: _Flight, worker: Worker, prompt_ids: list[int], params: SamplingParams, left: int
    ) -> Sample:
        rid = uuid.uuid4().hex

        async def send(url: str) -> Sample:
            task = asyncio.current_task()
            assert task is not None
            flight.requests[rid] = (worker, task)
            return await self._pool.client.generate(url, prompt_ids, params, left, rid)

        try:
            return await self._pool.run(worker, send)
        except asyncio.CancelledError:
            # Nobody waits for it any more: do not let it take the server's time.
            self._loop.create_task(self._abort(rid, worker))
            raise
        finally:
            flight.requests.pop(rid, None)

    async def _abort(self, rid: str, worker: Worker) -> None:
        urls = [w.url for w in self._pool.ready] if self._config.router else [worker.url]
        await asyncio.gather(*(self._pool.client.abort(url, rid) for url in urls), return_exceptions=True)

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """End the servers that were started here."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.abort_all()
        self._run(self._pool.close())
        if self._pool.snapshot is not None:
            self._pool.snapshot.delete()
        self._stop_loop()

    def waits_for(self) -> str:
        """The servers that cannot be sampled from, for people; "" if all can. From any thread."""
        return "; ".join(self._pool.troubles())

    def status(self) -> dict[str, str]:
        """State of each server by URL, for people and metrics."""
        return {worker.url: worker.state for worker in self._pool.workers}

    @property
    def router_url(self) -> str | None:
        """The router that requests go through now; None while they go straight to the servers."""
        return self._pool.router[1] if self._pool.router is not None and self._pool.router_up else None

    @property
    def router_pid(self) -> int | None:
        """Process group of the router started here."""
        return self._pool.router[0].popen.pid if self._pool.router is not None else None

    def _wait_started(self) -> None:
        if not self._started:
            self._run(self._pool.wait_started())
            self._started = True

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._submit(coroutine).result()

    def _call(self, function: Any, *args: Any) -> None:
        async def call() -> None:
            function(*args)

        self._run(call())

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _number(tag: str | None) -> int:
    return int(str(tag).rsplit(":", 1)[1])


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
