"""One pass of a batch through the policy: Megatron's pipeline schedule, the loss head on the last stage, the update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from gtpo_megatron import control, vigil
from gtpo_megatron.config import AlgorithmConfig, ParallelConfig
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.batch import MicroBatch, make_micro_batch
from gtpo_megatron.policy.collective import for_rank_zero
from gtpo_megatron.policy.head import TokenStatistics, token_statistics
from gtpo_megatron.policy.model import Policy, is_reporting_rank, output_weight
from gtpo_megatron.policy.objective import (
    BatchConstants,
    Objective,
    Report,
    completion_report,
    make_objective,
)
from gtpo_megatron.trajectories.packing import PackingPlan, plan_micro_batches
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable, Row, Share, shares_of

CompletionStatistics = dict[str, np.ndarray]  # [completions of the whole batch] each


@dataclass(frozen=True)
class PassResult:
    """What every rank knows after a pass over the batch."""

    loss: float
    completions: CompletionStatistics
    sums: dict[str, float]  # over the whole batch
    tokens: dict[str, list[np.ndarray]] | None = (
        None  # [L] of each completion, on rank 0, where they were asked for
    )


def pack(
    policy: Policy, trajectories: Sequence[Trajectory], parallel: ParallelConfig, token_budget: int
) -> list[MicroBatch]:
    """This rank's micro-batches, for `policy`, of a batch that every rank has; equally many on every data-parallel rank."""
    plan = _plan(policy, trajectories, parallel, token_budget)
    own = plan.micro_batches[parallel_state.get_data_parallel_rank()]
    return _micro_batches(policy, trajectories, own, parallel)


def deal(
    policy: Policy, trajectories: Sequence[Trajectory], parallel: ParallelConfig, token_budget: int
) -> tuple[BatchTable, list[MicroBatch]]:
    """The table of the batch that rank 0 has, and this rank's micro-batches as `pack` makes them. Collective.

    Only rank 0's `trajectories` count. Rank 0 makes the plan; each rank receives the rows of its data-parallel replica and
    the table, nothing else of the batch. Raises UserError on every rank for a completion beyond the budget.
    """
    replicas = control.gather_to_zero(parallel_state.get_data_parallel_rank())

    def shares() -> list[Share]:
        return shares_of(trajectories, _plan(policy, trajectories, parallel, token_budget))

    of_replica = for_rank_zero(shares)
    own = control.scatter(None if of_replica is None else [of_replica[replica] for replica in replicas])
    table = control.broadcast_from_zero(for_rank_zero(lambda: BatchTable.of(trajectories)))
    return table, _micro_batches(policy, own.rows(), own.micro_batches, parallel)


def _plan(
    policy: Policy, trajectories: Sequence[Trajectory], parallel: ParallelConfig, token_budget: int
) -> PackingPlan:
    return plan_micro_batches(
        [len(t.prompt_ids) for t in trajectories],
        [t.length for t in trajectories],
        token_budget=token_budget,
        data_parallel=parallel_state.get_data_parallel_world_size(),
        alignment=policy.alignment,
        micro_batches_multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
    )


def _micro_batches(
    policy: Policy,
    rows: Sequence[Trajectory] | Mapping[int, Row],
    micro_batches: Sequence[Sequence[int]],
    parallel: ParallelConfig,
) -> list[MicroBatch]:
    return [
        make_micro_batch(
            rows,
            indices,
            alignment=policy.alignment,
            context_size=parallel.context,
            context_rank=parallel_state.get_context_parallel_rank(),
            device=platform.device(),
        )
        for indices in micro_batches
    ]


def forward_backward(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    num_completions: int,
    *,
    temperature: float = 1.0,
) -> PassResult:
    """One forward and one backward pass; gradients are left, summed over all ranks, in the gradient buffers."""
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.config.finalize_model_grads_func = _finalize
    if policy.chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in policy.chunks]
        policy.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    data = run_schedule(
        policy, micro_batches, partial(_loss, policy, objective, temperature), forward_only=False
    )
    return _collect(data, num_completions)


def batch_objective(algorithm: AlgorithmConfig, table: BatchTable, initial_entropy: float) -> Objective:
    """The configured objective over this batch; `initial_entropy` is H_ini in nats (GTPO's gate)."""
    constants = BatchConstants.of(table, algorithm, platform.device())
    return make_objective(algorithm, constants, initial_entropy, parallel_state.get_context_parallel_group())


def _finalize(chunks: list[nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    # the loss carries its whole normaliser: no division by the number of tokens
    finalize_model_grads(chunks, None, **kwargs)


@torch.no_grad()
def score(
    policy: Policy, micro_batches: Sequence[MicroBatch], num_completions: int, *, temperature: float = 1.0
) -> PassResult:
    """One forward pass: each completion's mean entropy and its logprob gap to the sampler. The loss is 0."""

    def measure(batch: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, Report]:
        zero = statistics.logprobs.new_zeros(())
        if not batch.indices:
            return zero, Report()
        return zero, completion_report(batch, statistics, parallel_state.get_context_parallel_group())

    data = run_schedule(
        policy, micro_batches, partial(_loss, policy, Objective(measure), temperature), forward_only=True
    )
    return _collect(data, num_completions)


@torch.no_grad()
def with_logprobs(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    name: Literal["old_logprobs", "reference_logprobs"],
    *,
    temperature: float = 1.0,
) -> list[MicroBatch]:
    """The micro-batches with this policy's token logprobs under `name` (on the last stage), by one forward pass."""

    kept: list[Tensor] = []

    def keep(_: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, Report]:
        kept.append(statistics.logprobs.detach())
        return statistics.logprobs.new_zeros(()), Report()

    run_schedule(
        policy, micro_batches, partial(_loss, policy, Objective(keep), temperature), forward_only=True
    )
    if not kept:  # not the last stage
        return list(micro_batches)
    return [replace(batch, **{name: values}) for batch, values in zip(micro_batches, kept, strict=True)]


def token_logprobs(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    parallel: ParallelConfig,
    token_budget: int,
    *,
    temperature: float,
) -> list[np.ndarray]:
    """Logprobs of every token of every completion, on every rank: for certificates and inspection, not for training."""
    micro_batches = with_logprobs(
        policy, pack(policy, trajectories, parallel, token_budget), "old_logprobs", temperature=temperature
    )
    own: list[tuple[int, int, float]] = []
    if (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        for batch in micro_batches:
            index = torch.tensor(batch.indices, device=batch.completion.device)[batch.completion]
            own += zip(index.tolist(), batch.offset.tolist(), batch.old_logprobs.tolist(), strict=True)
    result = [np.zeros(t.length, np.float32) for t in trajectories]
    for index, offset, value in (entry for part in control.gather_to_zero(own) or [] for entry in part):
        result[index][offset] = value
    return control.broadcast_from_zero(result)


def run_schedule(
    policy: Policy, micro_batches: Sequence[MicroBatch], loss: Callable, *, forward_only: bool
) -> list[dict[str, Any]]:
    """Run Megatron's schedule; the last stage gets what `loss` reports for each micro-batch, others an empty list."""
    for chunk in policy.chunks:
        chunk.train(not forward_only)

    def forward_step(iterator: Any, model: nn.Module) -> tuple[Tensor, Callable]:
        vigil.progress()
        batch = next(iterator)
        keep_precision = {"fp32_output": False} if policy.bf16 else {}
        output = model(
            batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed, **keep_precision
        )
        return output, partial(loss, batch)

    iterators = [iter(micro_batches) for _ in policy.chunks]
    single = len(policy.chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=policy.chunks[0] if single else policy.chunks,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.size(1),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _loss(
    policy: Policy, objective: Objective, temperature: float, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Megatron's loss function of one micro-batch: (loss, token count, report). Last stage only."""
    statistics = response_statistics(policy, batch, hidden, temperature, objective.entropy_floor)
    loss, report = objective.loss(batch, statistics)
    count = torch.tensor(len(batch.targets), dtype=torch.int, device=hidden.device)
    report.sums["loss"] = loss.detach()
    return loss, count, {"indices": batch.indices, "report": report}


def response_statistics(
    policy: Policy, batch: MicroBatch, hidden: Tensor, temperature: float, entropy_floor: float | None = None
) -> TokenStatistics:
    """Token statistics at response positions from the last stage's hidden states [1, T (/ tp), hidden]."""
    model = policy.last_stage
    weight, rows = output_weight(model), hidden[0]
    # both mappings sum the head's partial gradients of the hidden states over tensor-parallel ranks
    if policy.config.sequence_parallel:
        rows = gather_from_sequence_parallel_region(rows)
    else:
        rows = copy_to_tensor_model_parallel_region(rows)
    return token_statistics(
        rows[batch.rows],
        weight,
        batch.targets,
        vocab_size=policy.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        temperature=temperature,
        entropy_floor=entropy_floor,
        # of Megatron's DistributedDataParallel: spares a gradient of [vocabulary, hidden] and a pass over it
        main_grad=getattr(weight, "main_grad", None) if weight.requires_grad else None,
    )


def _collect(data: list[dict[str, Any]], num_completions: int) -> PassResult:
    """Add up the reports of the last stages on rank 0, and tell every rank: some 16 bytes a completion."""
    own = _own_report(data) if data else None
    gathered = control.gather_to_zero(own if is_reporting_rank() else None)
    added = None if gathered is None else _added(gathered, num_completions)
    return control.broadcast_from_zero(added)


def _added(gathered: Sequence[Any], num_completions: int) -> PassResult:
    completions: CompletionStatistics = {}
    sums: dict[str, float] = {}
    for indices, values, scalars in (part for part in gathered if part is not None):
        for key, value in values.items():
            completions.setdefault(key, np.full(num_completions, np.nan, np.float32))[indices] = value
        for key, scalar in scalars.items():
            sums[key] = sums.get(key, 0.0) + scalar
    return PassResult(sums.pop("loss"), completions, sums)


def _own_report(data: list[dict[str, Any]]) -> tuple[list[int], CompletionStatistics, dict[str, float]]:
    """Indices, values by completion, and sums of this rank's micro-batches. Collective over context-parallel ranks."""
    reports: list[Report] = [d["report"] for d in data]
    keys = sorted({key for report in reports for key in report.sums})
    zero = reports[0].sums["loss"].double() * 0
    totals = torch.stack(
        [sum((r.sums[key].double() for r in reports if key in r.sums), zero) for key in keys]
    )
    dist.all_reduce(totals, group=parallel_state.get_context_parallel_group())
    fields = sorted({key for report in reports for key in report.completions})
    values = {
        key: torch.cat([r.completions[key] for r in reports if r.completions]).cpu().numpy() for key in fields
    }
    return [i for d in data for i in d["indices"]], values, dict(zip(keys, totals.tolist(), strict=True))


def gradients_are_finite(policy: Policy) -> bool:
    """Whether every gradient on every rank is finite. Collective."""
    bad = torch.zeros((), device=platform.device())
    for chunk in policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            bad += (~torch.isfinite(buffer.grad_data.sum())).float()
    dist.all_reduce(bad)
    return not bool(bad)
