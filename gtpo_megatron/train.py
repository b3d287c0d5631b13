"""The training loop: prompt -> group rollout -> reward -> trajectory -> store -> one forward, one backward -> engine."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from gtpo_megatron.analysis.report import write_report
from gtpo_megatron.config import RunConfig
from gtpo_megatron.data.suites import DATA
from gtpo_megatron.errors import COMPLETE, STOPPED, UserError
from gtpo_megatron.evaluation.training import evaluate_prompts, figures
from gtpo_megatron.policy.batch import MicroBatch
from gtpo_megatron.policy.checkpoint.checkpointer import NonFiniteError
from gtpo_megatron.policy.collective import for_rank_zero
from gtpo_megatron.policy.exchange.adapter import export_adapter
from gtpo_megatron.policy.exchange.export import export_hf_checkpoint
from gtpo_megatron.policy.model import world_rank
from gtpo_megatron.policy.optimizer import Update, apply_update
from gtpo_megatron.policy.seen import TokenWatch, seen_of
from gtpo_megatron.policy.step import (
    PassResult,
    batch_objective,
    deal,
    forward_backward,
    score,
    with_logprobs,
)
from gtpo_megatron.rollcall import peers_lost
from gtpo_megatron.run.batches import Batches
from gtpo_megatron.run.costs import Costs, Passes, memory_metrics, speed_metrics
from gtpo_megatron.run.profiling import traced
from gtpo_megatron.run.queue import Job
from gtpo_megatron.run.run import Run
from gtpo_megatron.run.signals import Interrupted
from gtpo_megatron.trajectories.analysis import summarise
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.seen import write_seen
from gtpo_megatron.trajectories.shares import BatchTable

log = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train as configured, from the newest checkpoint of the run if it has one. Collective; in the main thread alone,
    for it catches signals.

    Returns 0 when all steps are done, 3 when a signal stopped the run (the same command goes on from there).
    Raises UserError for what the user can mend, whatever was done until then is written; PeerLost where other ranks have
    ended or cannot be reached.
    """
    try:
        return _train(config)
    except RuntimeError as error:
        if (lost := peers_lost(error)) is not None:
            raise lost from error
        raise


def _train(config: RunConfig) -> int:
    with Run(config) as run, Batches(run) as batches:
        try:
            take_steps(run, batches)
        except Interrupted as cut:
            run.interrupted = True
            log.info("step %d: %s", run.step, cut)
        save(run, batches)
        finish(run)
    if run.main and run.step:  # a run may be stopped before there is anything to report
        write_report(run.path)
    return COMPLETE if run.complete else STOPPED


def take_steps(run: Run, batches: Batches) -> None:
    """All steps that are left, or those until the run is asked to stop. Collective.

    Raises Interrupted, between two steps, when the stop cut sampling short.
    """
    # at the start, or where the last process could not
    if evaluation_due(run):
        evaluate(run)
    while run.step < run.config.training.steps and not run.stop_requested():
        run.seconds.clear()
        with saved_before_giving_up(run, batches):
            trajectories = batches.next()
            table, micro_batches = dealt(run, trajectories)
        sampled_for, first = run.version, run.initial_entropy is None
        run.take_turn("training")
        with traced(run.config.training.profile, run.path, run.step + 1, world_rank()):
            passed, update = train_on(run, table, micro_batches)
        updates = run.version - sampled_for + (not update.applied)
        costs = Costs(
            Passes.of(run.config.algorithm, first=first, updates=updates),
            memory_metrics(run.policy, run.reference, run.optimizer),
            batches.sampled(run.step),
        )
        run.advance()
        with saved_before_giving_up(run, batches):
            try:
                with run.stage("weights"):
                    run.publish_weights()
            finally:  # a checkpoint never stands ahead of the metrics
                record(run, trajectories, passed, update, sampled_for, costs)
        with saved_before_giving_up(run, batches):
            stop_after_bad_steps(run, update)
            if run.config.alarm.action == "stop":
                for_rank_zero(lambda: run.alarm.check(run.step))
        if evaluation_due(run):
            with saved_before_giving_up(run, batches):
                evaluate(run)
        if _due(run.step, run.config.checkpoint.every):
            save(run, batches)
        run.checkpointer.poll()


@contextmanager
def saved_before_giving_up(run: Run, batches: Batches) -> Iterator[None]:
    """Save the run before an error that a person must mend ends it (no server left, mismatch, rewards fail). Collective."""
    try:
        yield
    except UserError:
        try:
            run.save_checkpoint(batches.sampler_state)
            run.checkpointer.finish()
        except NonFiniteError as worthless:
            log.warning("%s", worthless)
        raise


def save(run: Run, batches: Batches) -> None:
    """A checkpoint of this step, with every batch that is sampled already in the store."""
    with run.stage("checkpoint"):
        with saved_before_giving_up(run, batches):
            batches.settle()
        run.save_checkpoint(batches.sampler_state)


def dealt(run: Run, trajectories: Sequence[Trajectory]) -> tuple[BatchTable, list[MicroBatch]]:
    """The table of a batch that rank 0 has, and this rank's micro-batches of it. Collective."""
    with run.stage("training"):
        return deal(run.policy, trajectories, run.config.parallel, run.config.training.micro_batch_tokens)


def train_on(run: Run, table: BatchTable, micro_batches: list[MicroBatch]) -> tuple[PassResult, Update]:
    """The update(s) of one batch, each a new weight version; one that cannot be applied ends them.

    GTPO on policy: one forward and one backward pass, nothing else.
    """
    config, algorithm = run.config, run.config.algorithm
    temperature = config.rollout.temperature if algorithm.name != "sft" else 1.0
    count = len(table)
    with run.stage("training"):
        if run.initial_entropy is None and algorithm.name == "gtpo":
            entropy = score(run.policy, micro_batches, count, temperature=temperature).completions["entropy"]
            run.initial_entropy = float(entropy.mean(dtype=np.float64))
        micro_batches = with_old_logprobs(run, micro_batches, temperature)
        micro_batches = with_reference_logprobs(run, micro_batches, temperature)
        objective = batch_objective(algorithm, table, run.initial_entropy or 0.0)
        for _ in range(algorithm.updates_per_batch):
            watch = TokenWatch(config.logging.seen if algorithm.name != "sft" else "off")
            watched = watch.on(objective)
            passed = forward_backward(run.policy, micro_batches, watched, count, temperature=temperature)
            update = apply_update(run.optimizer, run.policy, passed.loss)
            run.version += update.applied
            if not update.applied:
                break
        passed = replace(passed, tokens=watch.gather(table))
    return passed, update


def with_old_logprobs(run: Run, micro_batches: list[MicroBatch], temperature: float) -> list[MicroBatch]:
    """Give the micro-batches what the likelihood ratio needs: nothing, the sampler's logprobs, or one more forward."""
    algorithm = run.config.algorithm
    if algorithm.name == "sft":
        return micro_batches
    if algorithm.old_logprobs == "sampler":
        return [replace(batch, old_logprobs=batch.sampled_logprobs) for batch in micro_batches]
    if algorithm.updates_per_batch > 1:
        return with_logprobs(run.policy, micro_batches, "old_logprobs", temperature=temperature)
    return micro_batches


def with_reference_logprobs(
    run: Run, micro_batches: list[MicroBatch], temperature: float
) -> list[MicroBatch]:
    """Give the micro-batches what the KL term needs: logprobs of the reference policy, or of the base under adapters."""
    if not run.config.algorithm.kl_beta:
        return micro_batches
    if run.reference is not None:
        return with_logprobs(run.reference, micro_batches, "reference_logprobs", temperature=temperature)
    with run.policy.without_adapters():
        return with_logprobs(run.policy, micro_batches, "reference_logprobs", temperature=temperature)


def record(
    run: Run,
    trajectories: Sequence[Trajectory],
    passed: PassResult,
    update: Update,
    version: int,
    costs: Costs,
) -> None:
    """Write the step's metrics, on rank 0. `version`: of the weights when the batch was taken.

    `staleness` is how many updates older the oldest token's weights were.
    """
    if not run.main:
        return
    tokens = sum(t.length for t in trajectories)
    metrics: dict[str, Any] = {"loss": passed.loss, "grad_norm": update.grad_norm, "lr": update.learning_rate}
    metrics |= {"update/applied": update.applied, "weight_version": run.version}
    if run.config.algorithm.name != "sft":
        metrics |= summarise(trajectories) | policy_metrics(
            passed, tokens, len(trajectories), run.config.algorithm.importance.level
        )
        metrics["entropy/initial"] = run.initial_entropy
        metrics |= run.mismatch or {}
        metrics["staleness"] = version - min(int(t.token_versions.min()) for t in trajectories)
    metrics |= {f"seconds/{name}": value for name, value in run.seconds.items()}
    lengths = [len(t.prompt_ids) + t.length for t in trajectories]
    frozen = run.config.model.lora is not None
    metrics |= speed_metrics(run.facts, costs, run.transferred, lengths, run.seconds, frozen=frozen)
    said, new = run.alarm.step(metrics) if run.config.algorithm.name != "sft" else ({}, [])
    run.metrics.log(run.step, metrics | said)
    run.progress.step(run.step, metrics)
    for alarm in new:
        log.warning("step %d: alarm %s: %s", run.step, alarm.rule, alarm.text)
        run.progress.note(f"warning, step {run.step}: {alarm.text} (alarm: {alarm.rule})")
    keep_seen(run, trajectories, passed)


def keep_seen(run: Run, trajectories: Sequence[Trajectory], passed: PassResult) -> None:
    """Write what training saw of the step beside its batch. A failure is said, and ends no run: nothing later needs the file."""
    algorithm = run.config.algorithm
    if run.config.logging.seen == "off" or algorithm.name == "sft":
        return
    try:
        seen = seen_of(algorithm, BatchTable.of(trajectories), passed)
        write_seen(run.store.directory, run.step - 1, trajectories, seen)
    except OSError as error:
        log.warning("step %d: what training saw of it could not be written: %s", run.step, error)


def policy_metrics(passed: PassResult, tokens: int, completions: int, importance: str) -> dict[str, float]:
    """What the training pass saw: entropy, gate, and the gap between trainer and sampler.

    `importance`: what the importance weights are of, tokens or whole completions (`algorithm.importance.level`).
    """
    values = passed.completions
    quantiles = np.quantile(values["entropy"], (0.1, 0.5, 0.9))
    metrics = {
        "entropy/mean": values["entropy"].mean(),
        "entropy/p10": quantiles[0],
        "entropy/p50": quantiles[1],
        "entropy/p90": quantiles[2],
        "logprob_gap/mean": values["gap"].mean(),
        "logprob_gap/max": values["gap_max"].max(),
    }
    if "gate" in values:
        metrics["gate/pass_rate"] = values["gate"].mean()
    per = {"clipped": ("ratio/clipped_share", tokens), "kl": ("kl/mean", tokens)}
    weighed = tokens if importance == "token" else completions
    per["importance_truncated"] = ("importance/truncated_share", weighed)
    for name, total in passed.sums.items():
        metric, count = per[name]
        metrics[metric] = total / count
    return {name: float(value) for name, value in metrics.items()}


def evaluation_due(run: Run) -> bool:
    """Whether accuracy is measured after this step: at the start and the end, and as often as configured."""
    return run.step in (0, run.config.training.steps) or _due(run.step, run.config.evaluation.every)


def evaluate(run: Run) -> None:
    """Measure accuracy and format on each suite that has no figures of this step yet; a line of metrics for each.

    Raises Interrupted, on every rank, if the run is asked to stop before it is done: figures of a part are no figures.
    """
    suites = run.not_evaluated()
    if not suites:
        return
    with run.stage("evaluation"), run.queue.turn(run.queue.enter(Job.EVALUATION)):
        for suite, prompts in suites:
            raise_if_asked_to_stop(run)
            sampled = evaluate_prompts(suite.config, run.engine, run.tokenizer, prompts.prompts, run.step)
            raise_if_asked_to_stop(run)
            if run.main:
                result = figures(sampled, suite.name)
                run.metrics.log(run.step, result)
                shown = ", ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in result.items())
                which = "" if suite.name == DATA else f" on {suite.name}"
                run.progress.note(f"evaluation{which} after step {run.step}: {shown}")


def raise_if_asked_to_stop(run: Run) -> None:
    """Interrupted on every rank if any rank is asked to stop: it samples no more, or not all of what it should."""
    if run.signals.agree():
        raise Interrupted("the evaluation is left to the process that goes on")


def stop_after_bad_steps(run: Run, update: Update) -> None:
    """Count updates skipped in a row; note each for replay, and end the run when there are too many."""
    if update.applied:
        run.bad_steps = 0
        return
    run.bad_steps += 1
    batch = run.store.path(run.step - 1)
    log.warning(
        "step %d: loss or gradients are not finite; the update was skipped (batch: %s)", run.step, batch
    )
    if run.main:
        note = run.path / "bad_steps" / f"step-{run.step:08d}.json"
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps({"step": run.step, "batch": str(batch), "weight_version": run.version}))
    run.checkpointer.check_weights()  # with such weights no later step can be better
    if run.bad_steps >= run.config.training.max_bad_steps:
        raise UserError(
            f"{run.bad_steps} steps in a row had a loss or gradients that are not finite "
            f"(training.max_bad_steps: {run.config.training.max_bad_steps}); their batches are named in "
            f"{run.path / 'bad_steps'}"
        )


def finish(run: Run) -> None:
    """Wait for the last checkpoint, and export the trained policy."""
    config = run.config
    with run.stage("checkpoint"):
        run.checkpointer.finish()
        run.checkpointer.check_weights()  # also where this process loaded its last checkpoint and trained no step
        if run.complete and config.checkpoint.export_hf:
            export_hf_checkpoint(
                run.policy,
                config.model.path,
                run.path / "hf",
                config.model.dtype,
                tokenizer=config.model.tokenizer,
            )
            if config.model.lora is not None:
                export_adapter(run.policy, config.model, run.path / "adapter")


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
