"""What a rank sends in a step: collectives by kind, group of ranks and bytes.

tests/plan/test_volumes.py holds them against those that the real step calls (tools/count_collectives.py), kind by kind and group
by group. Left out are whole numbers (shapes between stages, how many tokens go to an expert), scalars, and sums over a
completion: hundreds of bytes. Where layers do not divide by stages, a stage is taken as an average one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gtpo_megatron.plan.facts import Model
from gtpo_megatron.plan.work import Layout, Work

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "ring"]
Type = Literal["bfloat16", "float32"]
WIDTH: dict[Type, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Collective:
    """All calls of a kind in a step, over one group.

    `elements` are those of whole tensors: an all-gather's output, a reduce-scatter's or an all-to-all's input, all that goes round a ring.
    """

    kind: Kind
    group: (
        str  # tensor, context, data (with context), expert, expert tensor, expert data, pipeline, embedding
    )
    dtype: Type
    ranks: int
    stride: int  # between neighbours of the group
    elements: float

    @property
    def bytes(self) -> float:
        return self.elements * WIDTH[self.dtype]

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a ring; in an all-to-all where all send all others as much; to the next stage."""
        if self.kind == "send":
            return self.bytes
        return self.bytes * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class _Passes:
    """How often a step runs through a layer, in passes of all micro-batches."""

    forward: int  # with what recomputation repeats
    backward: int  # 0: scoring
    weights: int  # gradients of weights: 0 for scoring, and where they are frozen


@dataclass(frozen=True)
class _Stage:
    """A pipeline stage's part of the model."""

    layers: float
    expert_layers: float
    first: bool
    last: bool


def step_collectives(model: Model, layout: Layout, work: Work, stage: int) -> tuple[Collective, ...]:
    """What each rank of a pipeline stage calls in a step of forward and backward passes and an update, groups of one rank left out."""
    passes = _Passes(
        1 + (work.recompute == "full" and not work.forward_only),
        0 if work.forward_only else 1,
        int(work.kind == "training"),
    )
    part = _Stage(
        model.layers / layout.pipeline,
        model.expert_layers / layout.pipeline,
        stage == 0,
        stage == layout.pipeline - 1,
    )
    found = [
        *_hidden_states(model, layout, work, part, passes),
        *_small(model, layout, work, part, passes),
        *_experts(model, layout, work, part, passes),
        *_context(model, layout, work, part, passes),
        *_pipeline(model, layout, work, part, passes),
        *(_update(model, layout, work, part) if passes.weights else ()),
    ]
    return tuple(c for c in found if c.ranks > 1 and c.elements)


def decisive_stages(layout: Layout) -> tuple[int, ...]:
    """Stages of which one sends most: those between are like each other."""
    return tuple(sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1}))


def stage_parameters(model: Model, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters on a rank of a stage: (all but experts, experts). `layout.rank_parameters` of models that are not trained here, too."""
    layers, tensor = model.layers / layout.pipeline, layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    split = (model.dense_parameters - model.router_parameters + model.layers * model.layer_biases) / tensor
    whole = model.router_parameters + model.layers * model.layer_norms
    vocabulary = -(-model.vocab // tensor) * model.hidden
    ends = first * vocabulary + last * (model.hidden + (0 if model.tied and first else vocabulary))
    dense = layers / model.layers * (split + whole) + ends
    return dense, model.expert_parameters / layout.pipeline / (layout.expert * layout.expert_tensor)


def _hidden_states(
    model: Model, layout: Layout, work: Work, part: _Stage, passes: _Passes
) -> Iterator[Collective]:
    """Between tensor-parallel ranks, at both ends of attention and of a dense feed-forward part, and of the model."""
    # experts bring their own exchange; a shared one is a dense part beside them
    blocks = 2 * part.layers - part.expert_layers * (0 if model.shared_ffn else 1)
    forward, backward = passes.forward * blocks, passes.backward * blocks
    elements = work.tokens * work.micro_batches / layout.context * model.hidden

    def over(kind: Kind, times: float) -> Collective:
        return Collective(kind, "tensor", "bfloat16", layout.tensor, 1, times * elements)

    if layout.sequence:
        # the backward pass needs a product's whole input again for the gradient of its weight
        gathers = forward + backward + passes.weights * blocks + part.first * passes.backward + part.last
        scatters = forward + backward + part.first + part.last * passes.backward
        yield over("all_gather", gathers)
        yield over("reduce_scatter", scatters)
    else:
        yield over("all_reduce", forward + backward + part.first + part.last * passes.backward)


def _small(model: Model, layout: Layout, work: Work, part: _Stage, passes: _Passes) -> Iterator[Collective]:
    """Between tensor-parallel ranks, in fp32: the loss head's sums, and gradients of what every rank has whole."""
    elements = 0.0
    if part.last:  # the largest logit; the exponentials' sum, their moment, the target's logit
        elements = 4 * work.answered * work.tokens * work.micro_batches / layout.context
    if passes.weights:
        norms = model.head_norms  # each rank's are of its own heads
        if layout.sequence:  # all are of a rank's own tokens
            norms = model.layer_norms
            elements += model.router_parameters * part.layers / model.layers + part.last * model.hidden
        elements += part.layers * norms
    yield Collective("all_reduce", "tensor", "float32", layout.tensor, 1, elements)


def _experts(model: Model, layout: Layout, work: Work, part: _Stage, passes: _Passes) -> Iterator[Collective]:
    """Copies of tokens to their experts and back, and the weight of each copy; evenly loaded."""
    if not part.expert_layers:
        return
    tokens = work.tokens * work.micro_batches / layout.context / layout.tensor
    copies = part.expert_layers * tokens * model.experts_per_token
    times = passes.forward + passes.backward
    if layout.expert > 1:
        elements = times * copies * (2 * model.hidden + 1)
        yield Collective("all_to_all", "expert", "bfloat16", layout.expert, layout.expert_tensor, elements)
        return
    # every rank has its part of every expert: copies are gathered, and their parts of the result summed
    copies *= layout.tensor
    directions: tuple[tuple[Kind, int], ...] = (
        ("all_gather", passes.forward),
        ("reduce_scatter", passes.backward),
    )
    for kind, weights in directions:
        elements = copies * (times * model.hidden + weights)
        yield Collective(kind, "expert tensor", "bfloat16", layout.tensor, 1, elements)


def _context(model: Model, layout: Layout, work: Work, part: _Stage, passes: _Passes) -> Iterator[Collective]:
    """Keys and values of all ranks, and their gradients; a ring sends keys and values again for the backward pass."""
    share = part.layers / model.layers / layout.tensor
    keys = model.cache_elements * share * work.tokens * work.micro_batches

    def over(kind: Kind, elements: float) -> Collective:
        return Collective(kind, "context", "bfloat16", layout.context, layout.tensor, elements)

    if layout.ring:
        yield over("ring", (passes.forward + 2 * passes.backward) * keys)
    else:
        yield over("all_gather", passes.forward * keys)
        yield over("reduce_scatter", passes.backward * keys)


def _pipeline(
    model: Model, layout: Layout, work: Work, part: _Stage, passes: _Passes
) -> Iterator[Collective]:
    """Hidden states of each micro-batch to the next chunk, and their gradients to the one before."""
    tokens = work.tokens * work.micro_batches / layout.context / (layout.tensor if layout.sequence else 1)
    sends = layout.virtual - part.last + passes.backward * (layout.virtual - part.first)
    stride = layout.gpus // layout.pipeline
    yield Collective("send", "pipeline", "bfloat16", layout.pipeline, stride, sends * tokens * model.hidden)


def _update(model: Model, layout: Layout, work: Work, part: _Stage) -> Iterator[Collective]:
    """Gradients in fp32 summed over all ranks that hold the same parameters, and the parameters in bf16 gathered from their owners."""
    stage = 0 if part.first else layout.pipeline - 1 if part.last else 1
    dense, expert = stage_parameters(model, layout, stage)
    if layout.expert == 1:
        dense, expert = dense + expert, 0.0
    # Megatron's optimizers of the experts and of the rest each gather all parameters, unless the next forward pass does
    gathers = 2 if expert and not layout.overlap_parameters else 1
    groups = (
        ("data", layout.replicas, layout.tensor, dense),
        ("expert data", layout.expert_replicas, layout.expert, expert),
    )
    for name, ranks, apart, parameters in groups:
        if layout.sharded:  # gathered for the forward and for the backward pass of each micro-batch
            yield Collective(
                "all_gather", name, "bfloat16", ranks, apart, 2 * work.micro_batches * parameters
            )
            yield Collective("reduce_scatter", name, "float32", ranks, apart, work.micro_batches * parameters)
        elif layout.distributed:
            yield Collective("reduce_scatter", name, "float32", ranks, apart, parameters)
            yield Collective("all_gather", name, "bfloat16", ranks, apart, gathers * parameters)
        else:
            yield Collective("all_reduce", name, "float32", ranks, apart, parameters)
    if model.tied and layout.pipeline > 1 and (part.first or part.last):
        embedding = -(-model.vocab // layout.tensor) * model.hidden
        stride = layout.gpus // layout.pipeline * (layout.pipeline - 1)
        yield Collective("all_reduce", "embedding", "float32", 2, stride, embedding)
