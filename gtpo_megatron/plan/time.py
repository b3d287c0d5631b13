"""Seconds of a training step: operations over reached rates, the pipeline's bubble, communication that is not hidden.

Operations are model FLOP (`flop`); what is computed again for recomputation comes on top. Nothing is simulated: a stage's seconds for one micro-batch,
times micro-batches, times 1 + (stages - 1) / (chunks x micro-batches), the bubble of Narayanan et al. 2021 (arXiv:2104.04473, 2.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gtpo_megatron.plan.communication import (
    Collective,
    decisive_stages,
    stage_parameters,
    step_collectives,
)
from gtpo_megatron.plan.facts import GPU, Efficiency, Model
from gtpo_megatron.plan.flop import SHARES, attention_flop
from gtpo_megatron.plan.work import AGAIN, Layout, Work

# Relative errors that outputs carry: somewhat above the largest of docs/planner.md's table for that kind.
UNCERTAINTY = {"dense": 0.15, "mixture": 0.40, "rl": 0.25, "serving": 0.25, "memory": 0.05}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause, of the slowest stage."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # element-wise kernels
    routing: float = 0.0  # of tokens to experts
    tensor: float = 0.0  # communication that is not hidden, each
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0
    imbalance: float = 0.0  # the last stage has the head
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(vars(self), key=lambda name: getattr(self, name))


def step_time(model: Model, gpu: GPU, layout: Layout, work: Work, reached: Efficiency) -> StepTime:
    """Seconds of a step: forward and backward of all micro-batches, gradients, Adam."""
    stages = decisive_stages(layout)
    sent = [step_collectives(model, layout, work, stage) for stage in stages]
    links = _links(model, gpu, layout, reached)
    waits = {cause: max(_waited(s, cause, layout, links, reached) for s in sent) for cause in _CAUSES}
    steady = replace(_computed(model, gpu, layout, work, reached), **waits)
    bubble = steady.total * (layout.pipeline - 1) / (layout.virtual * work.micro_batches)
    if work.forward_only:
        return replace(steady, bubble=bubble)
    own = 0.0 if work.frozen else max(_updated(model, layout, stage) for stage in stages)
    return replace(
        steady,
        bubble=bubble,
        data=max(_data(s, layout, work, links, reached, steady.total) for s in sent),
        optimizer=_adam(gpu, own, work.offload, reached),
    )


def _updated(model: Model, layout: Layout, stage: int) -> float:
    """Parameters that a rank's optimizer updates."""
    dense, expert = stage_parameters(model, layout, stage)
    if layout.distributed or layout.sharded:
        return dense / layout.replicas + expert / layout.expert_replicas
    return dense + expert


def _adam(gpu: GPU, parameters: float, offload: bool, reached: Efficiency) -> float:
    """The update of a rank's own parameters: what is moved through memory, the GPU's or its share of the host's.

    Adam moves 28 bytes a parameter. On a GPU bf16 weights are written, too; on the host also the gradient that arrives, and
    the fp32 weight is read again for the bf16 one that leaves.
    """
    if offload:
        return 38 * parameters / (gpu.host_bandwidth * reached.host_memory)
    return 30 * parameters / (gpu.bandwidth * reached.memory)


def _computed(model: Model, gpu: GPU, layout: Layout, work: Work, reached: Efficiency) -> StepTime:
    """What an average stage computes in a step, and what the head adds to the last one."""
    share = work.tokens * work.micro_batches / (layout.context * layout.tensor * layout.pipeline)
    fast = gpu.bf16 * gpu.power
    bf16 = fast * reached.bf16_matmul
    rate = gpu.fp8 * gpu.power * reached.fp8_matmul if work.precision == "fp8" and gpu.fp8 else bf16
    products, scores = (again / 3 for again in AGAIN[work.recompute])
    whole, attended = SHARES[work.kind]
    part = 1 / 3 if work.forward_only else 1  # of memory traffic
    if work.forward_only:
        products = scores = 0.0
    weights = model.dense_parameters + model.active_expert_parameters
    head = 6 * model.head_parameters * share / bf16 * whole
    ffn = 10 * (model.ffn * (model.layers - model.expert_layers) + model.shared_ffn * model.expert_layers)
    traffic = (30 * model.hidden * model.layers + ffn) * 2 * (reached.eager_traffic if work.eager else 1)
    routed = model.expert_layers * model.experts_per_token * model.hidden
    return StepTime(
        matmul=6 * weights * share / rate * (whole + products) + head,
        attention=attention_flop(model, work.row)
        * share
        / (fast * (reached.torch_attention if work.torch_attention else reached.attention))
        * (attended + scores),
        memory=traffic * share * (part + products) / (gpu.bandwidth * reached.memory),
        routing=routed * share * reached.routed_element_ps * 1e-12 * (part + products),
        imbalance=head * _imbalance(model, layout),
    )


def _imbalance(model: Model, layout: Layout) -> float:
    """What the last stage has of the head beyond the average; none where layers do not divide, and embedding and head count as some."""
    divides = model.layers % (layout.pipeline * layout.virtual) == 0
    return layout.pipeline - 1 if divides else 0


# What a step's communication is called by, and the groups over which it goes. That over replicas is apart: it has a pass to hide behind
_CAUSES = {
    "tensor": ("tensor",),
    "context": ("context",),
    "expert": ("expert", "expert tensor"),
    "pipeline": ("pipeline",),
}
_UPDATE = ("data", "expert data", "embedding")


@dataclass(frozen=True)
class _Links:
    """What a rank's links carry, in bytes/s."""

    inside: float  # of a node
    outside: float
    node: int  # ranks in it
    together: int  # copies of a token that cross to a node as one; 1: each for itself


def _links(model: Model, gpu: GPU, layout: Layout, reached: Efficiency) -> _Links:
    together = model.experts_per_token if layout.once_per_node else 1
    return _Links(gpu.nvlink * reached.nvlink, gpu.network * reached.network, gpu.node, together)


def _seconds(collective: Collective, links: _Links) -> float:
    """Of a stage's calls in a step, if nothing hid them."""
    within = max(1, links.node // collective.stride)  # ranks of the group in a node
    if collective.ranks <= within:
        return collective.sent / links.inside
    if collective.kind == "send":
        return collective.sent / links.outside
    if collective.kind == "all_to_all":
        return _exchange(collective, within, links)
    # in a ring a node's members share its network cards
    return collective.sent / min(links.inside, links.outside * within)


def _exchange(collective: Collective, within: int, links: _Links) -> float:
    """Copies of tokens on their way to experts. Between nodes each crosses its rank's own card."""
    nodes, copies = collective.ranks / within, links.together
    remote = (1 - 1 / nodes) * collective.bytes
    near = collective.sent - remote
    crossing = remote * nodes * (1 - (1 - 1 / nodes) ** copies) / copies
    return near / links.inside + crossing / links.outside


def _waited(
    stage: Iterable[Collective], cause: str, layout: Layout, links: _Links, reached: Efficiency
) -> float:
    """Seconds of a stage's communication that nothing hides. Without chunks of its own a stage waits for what it is sent."""
    exposed = getattr(reached, f"exposed_{cause}")
    if cause == "pipeline" and layout.virtual == 1:
        exposed = 1.0
    return exposed * sum(_seconds(c, links) for c in stage if c.group in _CAUSES[cause])


def _data(
    stage: Iterable[Collective],
    layout: Layout,
    work: Work,
    links: _Links,
    reached: Efficiency,
    passes: float,
) -> float:
    """Gradients summed and parameters gathered over the replicas, less what half the backward pass hides of what may overlap."""
    alone = beside = 0.0
    for collective in stage:
        if collective.group not in _UPDATE:
            continue
        gathers = collective.kind == "all_gather"
        overlaps = layout.overlap_parameters if gathers else layout.overlap_gradients
        seconds = _seconds(collective, links)
        if overlaps and collective.group != "embedding":
            beside += seconds
        else:
            alone += seconds
    # of the last micro-batch of each chunk; parameters that are sharded come and go with every one
    window = passes if layout.sharded else passes / work.micro_batches * layout.pipeline
    return alone + max(beside - window * (2 / 3) / 2, beside * reached.exposed_data)


def transfer_seconds(model: Model, gpu: GPU, reached: Efficiency, senders: int = 1) -> float:
    """All weights in bf16 from the trainer to the servers; `senders` stages send theirs at the same time."""
    return model.parameters * 2 / senders / (min(gpu.nvlink, gpu.network) * reached.refit_share)
