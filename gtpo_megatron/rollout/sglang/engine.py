"""SGLangEngine: a rollout engine over SGLang servers, for rank 0 of the trainer."""

import asyncio
import atexit
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from gtpo_megatron import control
from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Group, NamedTensor, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang.audit.survey import differences, scores
from gtpo_megatron.rollout.sglang.client import Client
from gtpo_megatron.rollout.sglang.sampling import Job, Sampler
from gtpo_megatron.rollout.sglang.servers.launch import DTYPES, Device, make_launch, resolve_key
from gtpo_megatron.rollout.sglang.servers.model import ServedModel
from gtpo_megatron.rollout.sglang.servers.pool import Pool
from gtpo_megatron.rollout.sglang.servers.states import Timing
from gtpo_megatron.rollout.sglang.sockets import allowed_sockets
from gtpo_megatron.rollout.sglang.weights.buckets import Bucket, Layout, Snapshot, fill, pack
from gtpo_megatron.rollout.sglang.weights.stages import Address, RemoteStage, give_up, relay
from gtpo_megatron.rollout.sglang.weights.transfer import Link, Transfer, complete

log = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_TIMING = Timing()


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
        together: the servers share their GPUs with the trainer, and give up their memory when they are told to.
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
        *,
        together: bool = False,
    ) -> None:
        self.version = -1
        self.updates_in_flight = config.partial
        self._config = config
        self._directory = Path(log_dir).absolute()
        self._vocabulary = int(AutoConfig.from_pretrained(model_path).get_text_config().vocab_size)
        # a server left over from another run never has this run's weights
        self._run_name = uuid.uuid4().hex[:8]
        self._updates = 0  # so many were begun
        self._layouts: Sequence[Layout] = ()  # of the stage's buckets, once they are known
        self._stages: Sequence[RemoteStage] = ()
        self._jobs: set[Job] = set()
        self._started = self._closed = self._ended = False  # ended: samples no more
        self._starting: Future[None] | None = None  # the wait for servers
        launch = None
        if not config.given or config.router:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            launch = make_launch(config, model_path, dtype, device, self._directory, together=together)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        atexit.register(self.close)

        sockets, wanted = allowed_sockets(), config.concurrency * (len(config.urls) or config.servers)
        if sockets < wanted:
            log.warning(
                "%d completions at once, not %d: no more files may be open (ulimit -Hn)", sockets, wanted
            )

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
                sockets,
                ServedModel.at(model_path, DTYPES[dtype]),
            )
            await pool.start()
            return pool

        try:
            self._pool = self._run(make_pool())
        except BaseException:
            self._stop_loop()
            raise
        self._sampler = Sampler(self._pool.fleet, self._pool.client, config, timing.attempts)

    # ------------------------------------------------------------------ weights

    def follow_stages(
        self, own: Sequence[Layout], others: Sequence[tuple[Address, Sequence[Layout]]]
    ) -> None:
        """From now on updates bring the weights of this rank's stage alone, laid out so; other ranks send those of theirs.

        Each of the others has a `StageSender` at its address, which is fed at every update. Needs weight_transfer:
        distributed.
        """
        limits = self._pool.updates.link.collective_s, control.STEP_LIMIT.total_seconds()
        self._layouts = tuple(own)
        self._stages = [RemoteStage(address, layouts, *limits) for address, layouts in others]

    def update_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Replace the weights on all servers. The next bucket is produced while the last one is sent.

        A server that fails on the way does not fail the update: it is brought to these weights later, from a copy kept
        in host memory (or on disk), before it is sampled from again.

        Raises:
            UserError: a server did not start, or none is left.
        """
        self._update(lambda memory: self._buckets(weights, memory), version)

    def update_from_buckets(self, buckets: Iterable[Bucket], version: int) -> None:
        """As `update_weights`, of weights that are packed already. One bucket is asked for while the one before it is sent."""
        self._update(lambda _: buckets, version)

    def _update(self, buckets: Callable[[Sequence[torch.Tensor]], Iterable[Bucket]], version: int) -> None:
        """`buckets` makes them, given memory that they may use."""
        self._updates += 1
        relays: list[Future[None]] = []
        try:
            self.wait_started()
            self._replace_weights(buckets, version, relays)
        except BaseException:
            self._run(give_up(self._stages, self._updates, relays))
            raise
        self._run(self._pool.updates.wait_for_quorum())
        self.version = version

    def _replace_weights(
        self,
        buckets: Callable[[Sequence[torch.Tensor]], Iterable[Bucket]],
        version: int,
        relays: list[Future[None]],
    ) -> None:
        updates = self._pool.updates
        tag = f"{self._run_name}:{version}"
        targets = self._run(updates.begin())
        # No server is brought to the old weights once an update has begun: their memory takes the new ones.
        old = updates.snapshot
        memory = [b.flat for b in old.buckets if isinstance(b, Bucket)] if old is not None else []
        snapshot = Snapshot(
            version, self._directory / f"weights-{version}" if self._on_disk else None, memory
        )
        transfer = Transfer(updates.link, targets, tag)
        relays += [self._submit(relay(stage, transfer.send, self._updates)) for stage in self._stages]
        try:
            sent: Future[None] | None = None
            for bucket in buckets(memory):
                snapshot.add(bucket)
                if sent is not None:
                    sent.result()
                sent = self._submit(transfer.send(bucket))
            for future in [sent, *relays] if sent is not None else relays:
                future.result()
            for stage in self._stages:
                snapshot.buckets += stage.kept(self._updates)
            snapshot.finish()
            done, faults = self._run(complete(transfer, snapshot))
        except BaseException:
            self._run(give_up(self._stages, self._updates, relays))
            self._run(transfer.settle())
            self._call(updates.end, None, None, [], {})
            raise
        self._call(updates.end, tag, snapshot, done, faults)

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

    def _buckets(self, weights: Iterable[NamedTensor], memory: Sequence[torch.Tensor]) -> Iterator[Bucket]:
        if self._layouts:
            return fill(self._layouts, weights, memory)
        return pack(weights, self._config.bucket_mb << 20, memory)

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
        if self._pool.fleet.tag is None:
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
        job = Job(params)
        self._jobs.add(job)
        job.task = self._submit(self._sampler.sample_all(job, requests))
        if self._ended:  # looked at after the job is where abort_all sees it
            self._end(job)
        return self._groups(job)

    def abort_all(self, *, for_good: bool = False) -> None:
        """End every generate that is under way: their iterators stop after the finished groups.

        `for_good` also later ones, and the wait for servers that are starting.
        """
        self._ended = self._ended or for_good
        if for_good and self._starting is not None:
            self._starting.cancel()
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

    def _groups(self, job: Job) -> Iterator[Group]:
        try:
            while (item := job.out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                del job.flights[item.request]
                yield item
        finally:
            if self._config.partial and job in self._jobs:
                self._run(self._sampler.keep_unfinished(job))
            self._end(job)

    def _end(self, job: Job) -> None:
        self._jobs.discard(job)
        if job.task is not None:
            job.task.cancel()
        job.out.put(None)

    # ------------------------------------------------------------------ memory

    def release_memory(self) -> None:
        """The servers give up their memory, and so their weights; sampling stops. See `servers.occupation`."""
        self._run(self._pool.occupation.release_memory())

    def resume_weights(self) -> None:
        """They take room for weights: what comes next is `update_weights`."""
        self._run(self._pool.occupation.resume_weights())

    def resume_cache(self) -> None:
        """They take the rest, and are sampled from."""
        self._run(self._pool.occupation.resume_cache())

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """End the servers that were started here."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.abort_all()
        self._run(self._pool.close())
        if self._pool.updates.snapshot is not None:
            self._pool.updates.snapshot.delete()
        self._stop_loop()

    def waits_for(self) -> str:
        """The servers that cannot be sampled from, for people; "" if all can. From any thread."""
        return "; ".join(self._pool.fleet.troubles())

    def status(self) -> dict[str, str]:
        """State of each server by URL, for people and metrics."""
        return {worker.url: worker.state for worker in self._pool.fleet.workers}

    @property
    def router_url(self) -> str | None:
        """The router that requests go through now; None while they go straight to the servers."""
        return self._pool.router.url if self._pool.router is not None else None

    @property
    def router_pid(self) -> int | None:
        """Process group of the router started here."""
        router = self._pool.router
        return router.process.popen.pid if router is not None and router.process is not None else None

    def wait_started(self) -> None:
        """Wait until the servers answer, at the first call, or until `abort_all` ends the engine for good.

        Raises UserError where one does not start.
        """
        if self._started:
            return
        self._starting = self._submit(self._pool.wait_started())
        if self._ended:  # looked at after the wait is where abort_all sees it
            self._starting.cancel()
        with suppress(CancelledError):
            self._starting.result()
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
