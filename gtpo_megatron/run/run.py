"""Everything that a run holds, opened and closed in one place; `train.py` is the algorithm that walks over it."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gtpo_megatron import control
from gtpo_megatron.config import DataConfig, RunConfig
from gtpo_megatron.data.prompts import PromptSet, load_prompts, stop_token_ids, with_solutions_within
from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.data.suites import Suite, metrics_of, naming, suites_in_training
from gtpo_megatron.errors import COMPLETE, FAILED, MISTAKE, STOPPED, UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.layout import sequence_alignment
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.checkpoint.checkpointer import Checkpointer, TrainState
from gtpo_megatron.policy.collective import for_rank_zero, on_rank_zero, together
from gtpo_megatron.policy.lending import Lender
from gtpo_megatron.policy.model import (
    DTYPES,
    Policy,
    build_policy,
    initialize_parallel,
    world_rank,
)
from gtpo_megatron.policy.optimizer import Optimizer, build_optimizer
from gtpo_megatron.policy.step import token_logprobs
from gtpo_megatron.rewards.pool import RewardPool
from gtpo_megatron.rollout.collect import GroupPrompt, group_seed
from gtpo_megatron.rollout.embedded import EmbeddedEngine
from gtpo_megatron.rollout.protocol import NamedTensor, RolloutEngine, SamplingParams
from gtpo_megatron.run.alarm import AlarmWatch
from gtpo_megatron.run.certificate import fixed_sequences
from gtpo_megatron.run.costs import Flow, send
from gtpo_megatron.run.directory import Owner
from gtpo_megatron.run.facts import RunFacts
from gtpo_megatron.run.identity import check_directory, check_same_on_all_ranks, keep_config, remove_leftovers
from gtpo_megatron.run.logs import logging_to
from gtpo_megatron.run.metrics import MetricsWriter, read_metrics
from gtpo_megatron.run.progress import RunProgress
from gtpo_megatron.run.queue import EngineQueue, Job
from gtpo_megatron.run.signals import StopSignals
from gtpo_megatron.run.stages import Stages
from gtpo_megatron.run.turns import Turn, Turns
from gtpo_megatron.run.weights import Sender, make_sender, with_whole_export
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

log = logging.getLogger("gtpo_megatron")


class Run:
    """A run in progress on this rank. Use as a context; building it is collective."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.path
        self._stack = ExitStack()
        self.interrupted = False  # a signal cut something short that the next process has to do
        try:
            self._open()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _open(self) -> None:
        config = self.config
        platform.init_process_group()
        check_same_on_all_ranks(config)
        if config.rollout.engine == "sglang":
            control.allow_waits(
                config.rollout.sglang.start_timeout_s + config.rollout.sglang.no_server_timeout_s
            )
        self.main = world_rank() == 0
        self.owner: Owner | None = None  # on rank 0
        on_rank_zero(self._claim_directory)
        self._stack.enter_context(logging_to(self.path / "logs" / f"rank-{world_rank()}.log"))
        initialize_parallel(config.parallel, config.training.seed)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.model.tokenizer or config.model.path
        )
        self.prompts = self._load_prompts(config.data)
        if config.algorithm.name == "sft":
            self.prompts = with_solutions_within(self.prompts, self.tokenizer, longest_sequence(config))
            log.info(
                "%s: %d prompts left out, too long with solutions",
                config.data.path,
                self.prompts.long_solutions,
            )
        self.evaluated_on = [
            (suite, self._load_prompts(suite.data, suite.keys)) for suite in suites_in_training(config)
        ]
        self.sampler = PromptSampler(
            len(self.prompts), config.training.seed, config.data.shuffle, self.prompts.fingerprint
        )
        self.policy: Policy = build_policy(
            config.model, config.parallel, config.training, distributed_optimizer=config.optimizer.distributed
        )
        self.reference: Policy | None = None
        if config.algorithm.kl_beta and config.model.lora is None:  # under adapters it is their base
            self.reference = build_policy(config.model, config.parallel, config.training, trained=False)
        updates = config.training.steps * config.algorithm.updates_per_batch
        self.optimizer: Optimizer = build_optimizer(config.optimizer, self.policy, updates)
        self.store = TrajectoryStore(self.path / "trajectories")
        self.checkpointer = Checkpointer(
            self.path / "checkpoints", config, self.policy, self.optimizer, config.model.path
        )
        self._restore()
        self._open_record()
        self._open_sampling()
        # not before there is an engine to see to it, nor after the wait for servers
        self.signals = self._stack.enter_context(StopSignals(self._on_stop, listen=self.engine is not None))
        self._start_sampling()

    def _claim_directory(self) -> None:
        check_directory(self.config)
        self.owner = Owner(self.path, self.config.training.steps)
        self._stack.push(self._give_free)
        keep_config(self.config)
        remove_leftovers(self.path)

    def _give_free(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, SystemExit):  # asked to stop before the first step: see cluster.ranks
            error, exit_code = None, STOPPED
        elif isinstance(error, UserError):
            exit_code = MISTAKE
        elif error is not None:
            exit_code = FAILED
        else:
            exit_code = COMPLETE if self.complete else STOPPED
        self.owner.end(error, exit_code)

    def _load_prompts(self, data: DataConfig, keys: str = "data.") -> PromptSet:
        with naming(keys):
            prompts = load_prompts(data, self.tokenizer)
        log.info(
            "%s: %d prompts of %d rows (%d too long, %d malformed)",
            data.path,
            len(prompts),
            prompts.rows,
            prompts.too_long,
            prompts.skipped,
        )
        return prompts

    def _restore(self) -> None:
        loaded = self.checkpointer.load_latest()
        state = loaded or TrainState(0, 0, None, self.sampler.state_dict())
        self.sampler.load_state_dict(state.sampler)
        self.step, self.version = state.step, state.weight_version
        self.initial_entropy, self.bad_steps = state.initial_entropy, state.bad_steps
        self.saved_step = state.step if loaded else -1
        if self.owner is not None:
            self.owner.update(step=self.step)

    def _open_record(self) -> None:
        self.metrics: MetricsWriter | None = None
        self.alarm: AlarmWatch | None = None  # on rank 0
        self.facts = RunFacts.of(self.config, dist.get_world_size(), platform.device_name())
        if self.main:
            self.facts.write(self.path)
            self.metrics = self._stack.enter_context(MetricsWriter(self.path, self.config.logging))
            self.metrics.truncate_after(self.step if self.step else -1)
            self.alarm = AlarmWatch(self.config.alarm, read_metrics(self.metrics.path))
        self.progress: RunProgress = self._stack.enter_context(
            RunProgress(self.config.training.steps, self.config.logging.progress, self.step, self.main)
        )
        stages = Stages(self.progress, self.owner)
        self.stage, self.seconds = stages.stage, stages.seconds
        if self.step:
            self.progress.note(f"resumed after step {self.step} from {self.path / 'checkpoints'}")
        evaluated = [(suite.title, prompts) for suite, prompts in self.evaluated_on]
        for name, prompts in [("data", self.prompts), *evaluated]:
            if prompts.neutralised:
                self.progress.note(
                    f"{name}: {prompts.neutralised} rows spell a special token of the tokenizer; "
                    "the prompts have it as plain text"
                )
            if prompts.too_long or prompts.skipped:
                self.progress.note(
                    f"{name}: {prompts.too_long} prompts over the token limit and {prompts.skipped} malformed rows "
                    f"left out of {prompts.rows}"
                )

        if self.prompts.long_solutions:
            self.progress.note(
                f"data: {self.prompts.long_solutions} prompts left out that have, with their solutions, over "
                f"{longest_sequence(self.config)} tokens"
            )

    def _open_sampling(self) -> None:
        config = self.config
        self.engine: RolloutEngine | None = None
        self.sender: Sender | None = None  # None: the whole export goes by rank 0
        self.turns: Turns | None = None  # None: engine and trainer have memory of their own
        self.mismatch: dict[str, float] | None = None  # of the newest certificate
        self.transferred: Flow | None = None  # bytes of weights, at the newest transfer; on rank 0
        self.queue = EngineQueue()  # before this rank's engine
        self.rewards: RewardPool | None = None
        self.samples = config.algorithm.name != "sft" or bool(self.evaluated_on)
        if not self.samples:
            return
        embedded = config.rollout.engine == "embedded" or config.algorithm.name == "sft"

        def start() -> None:
            self.engine = self._make_engine(embedded)
            self._stack.callback(self.engine.close)
            self.progress.waits_for = lambda: "; ".join(
                filter(None, (self.queue.waits_for(), self.engine.waits_for()))
            )
            if config.algorithm.name != "sft":
                self.rewards = self._stack.enter_context(RewardPool(config.rewards))

        if not embedded:
            sglang = config.rollout.sglang
            which = (
                ", ".join(sglang.urls) or sglang.urls_file or sglang.urls_dir or f"starting {sglang.servers}"
            )
            self.progress.note(f"waiting for SGLang servers: {which} (logs: {self.path / 'logs'})")
        with self.progress.stage("start of the engine"):
            if not embedded and config.rollout.placement == "together":
                self.turns = Turns(Lender(self.policy, self.optimizer, state=not config.optimizer.offload))
            together(lambda: start() if embedded or self.main else None)
            if self.turns is not None:
                self.turns.follow(self.engine)
            if not embedded:
                self.sender = make_sender(config, self.policy, self.engine, self._stack)

    def _start_sampling(self) -> None:
        """Give the engine its first weights as soon as it can take them; nothing if the run is asked to stop before.

        Ranks wait for servers that are starting on the control group: none has begun an export, whose groups have a shorter
        time limit.
        """
        if not self.samples:
            return
        with self.progress.stage("start of the engine"):
            together(lambda: self.engine.wait_started() if self.engine is not None else None)
            if not self.signals.agree():
                self.publish_weights()

    def take_turn(self, turn: Turn) -> None:
        """Go over to a step's next turn, where trainer and servers share their memory. Collective."""
        if self.turns is not None:
            with self.stage("turns"):
                self.turns.take(turn)

    def _make_engine(self, embedded: bool) -> RolloutEngine:
        config = self.config
        if embedded:
            return EmbeddedEngine(
                config.model.path,
                DTYPES[config.model.dtype],
                platform.device(),
                config.rollout.batch_size,
                self.tokenizer.pad_token_id,
            )
        from gtpo_megatron.rollout.sglang.engine import SGLangEngine

        rollout, logs = config.rollout, self.path / "logs"
        together = rollout.placement == "together"
        return SGLangEngine(rollout.servers, config.model.path, config.model.dtype, logs, together=together)

    def publish_weights(self) -> None:
        """Give the engine the policy's weights, and see that it samples with them. Collective."""
        if not self.samples:
            return
        with self._turn_for_weights():
            self.take_turn("weights")
            if self.sender is not None:
                self.transferred = self.sender.publish(self.version)
            else:
                with_whole_export(self.policy, self.engine, self._send)
            if self.config.rollout.engine != "sglang" or self.config.algorithm.name == "sft":
                return
            self._examine_servers()

    def _examine_servers(self) -> None:
        """Let servers take the rest of their memory and, where it is time, compare them with the trainer."""
        sglang, at_start = self.config.rollout.sglang, self.mismatch is None
        if not (at_start or (sglang.verify_every and self.version % sglang.verify_every == 0)):
            self.take_turn("sampling")
            return
        if sglang.checksums == "certificate" or (sglang.checksums == "start" and at_start):
            self._compare_checksums()
        sequences = fixed_sequences(self.config, self.prompts, self.tokenizer, self.step)
        # scored while servers hold no more than their weights
        budget = self.config.training.micro_batch_tokens
        trainer = token_logprobs(self.policy, sequences, self.config.parallel, budget, temperature=1.0)
        self.take_turn("sampling")
        self._certify(sequences, trainer)

    @contextmanager
    def _turn_for_weights(self) -> Iterator[None]:
        """The turn of all ranks' engines for new weights: between two batches, or where they can go on with others within one.

        Collective. Ranks wait for it on the control group: none has begun an export, whose groups have a shorter time limit.
        """
        with ExitStack() as stack:

            def ready() -> None:
                if self.engine is not None:
                    place = self.queue.enter(Job.UPDATE, self.step, beside=self.engine.updates_in_flight)
                    stack.enter_context(self.queue.turn(place))

            together(ready)
            yield

    def _send(self, weights: Iterator[NamedTensor]) -> None:
        self.transferred = None
        self.transferred = send(self.engine, weights, self.version)

    def _certify(self, sequences: Sequence[Trajectory], trainer: Sequence[np.ndarray]) -> None:
        """Compare the servers' logprobs of the sequences with the trainer's; see rollout.sglang.audit.certificate."""
        from gtpo_megatron.rollout.sglang.audit.certificate import certify, default_bound

        config = self.config
        bound = config.rollout.sglang.max_logprob_gap
        bound = bound or default_bound(config.model.dtype, config.model.fp8)

        def compare() -> dict[str, float]:
            if self.engine is None:
                return {}
            scores = self.engine.score([(t.prompt_ids.tolist(), t.token_ids.tolist()) for t in sequences])
            worst = max(certify(scores, trainer, bound).values(), key=lambda m: m.mean_abs)
            return worst.metrics()

        try:
            self.mismatch = on_rank_zero(compare)
        except UserError as disagreement:
            # says which tensors differ, if that is the reason; if none does, the arithmetic is
            self._compare_checksums()
            raise disagreement

    def _compare_checksums(self) -> None:
        with_whole_export(self.policy, self.engine, lambda weights: self.engine.verify_weights(weights))

    @property
    def sampling_params(self) -> SamplingParams:
        """How training completions are sampled."""
        rollout = self.config.rollout
        return SamplingParams(
            n=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=stop_token_ids(self.tokenizer),
        )

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: all steps are done, and what belongs to the last was not cut short."""
        return self.step >= self.config.training.steps and not self.interrupted

    def not_evaluated(self) -> list[tuple[Suite, PromptSet]]:
        """The suites of which the metrics hold no evaluation of the current step. Collective."""

        def measured() -> set[str]:
            rows = read_metrics(self.path / "metrics.jsonl")
            return {name for row in rows if row["step"] == self.step for name in row}

        names = on_rank_zero(measured) if self.evaluated_on else set()
        return [
            (suite, prompts)
            for suite, prompts in self.evaluated_on
            if f"{metrics_of(suite.name)}accuracy" not in names
        ]

    def next_prompts(self, count: int, step: int, first_group: int = 0) -> list[GroupPrompt]:
        """The next prompts of the sampler, with their places in the batch and seeds."""
        return [
            GroupPrompt(
                group, self.prompts.prompts[index], group_seed(self.config.training.seed, step, group), index
            )
            for group, index in enumerate(self.sampler.next(count), start=first_group)
        ]

    def advance(self) -> None:
        """A step is done."""
        self.step += 1
        if self.owner is not None:
            self.owner.update(step=self.step)

    def save_checkpoint(self, sampler_state: dict[str, Any]) -> None:
        """Write a checkpoint of the current step, once, to go on with prompts at `sampler_state`. Collective."""
        if self.saved_step == self.step:
            return
        self.checkpointer.save(
            TrainState(
                step=self.step,
                weight_version=self.version,
                initial_entropy=self.initial_entropy,
                sampler=sampler_state,
                bad_steps=self.bad_steps,
            )
        )
        self.saved_step = self.step

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop (Ctrl-C, SIGTERM, SIGUSR1). Collective.

        Raises UserError if another process has taken the run's directory.
        """
        lost = self.owner is not None and self.owner.lost is not None
        if not self.signals.agree(lost):
            return False
        for_rank_zero(lambda: self.owner.check())
        if self.owner is not None:
            self.owner.stopping = True
        return True

    def _on_stop(self) -> None:
        """As soon as this rank knows of a stop, in a thread of its own: nothing more is sampled."""
        if self.owner is not None:
            self.owner.stopping = True
        if self.main:
            self.progress.note("stopping: saves and ends (Ctrl-C again: at once)")
        if self.engine is not None:
            self.engine.abort_all(for_good=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """End engine, workers and files, say how the run ended, and give its directory free."""
        self._stack.__exit__(*error)


def longest_sequence(config: RunConfig) -> int:
    """Tokens of a prompt and its completion that the model's positions and a micro-batch, padding included, can hold."""
    alignment = sequence_alignment(config.parallel, fp8=config.model.fp8.enabled)
    within_batch = config.training.micro_batch_tokens // alignment * alignment
    return min(within_batch, read_shape(config.model.path).max_positions)
