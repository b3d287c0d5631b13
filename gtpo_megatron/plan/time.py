"""Seconds of a training step: operations over reached rates, the pipeline's bubble, communication that is not hidden.

Operations are model FLOP (`flop`); what is computed again for recomputation comes on top. Nothing is simulated: a stage's seconds for one micro-batch,
times micro-batches, times 1 + (stages - 1) / (chunks x micro-batches), the bubble of Narayanan et al. 2021 (arXiv:2104.04473, 2.2).
"""

from dataclasses import dataclass, replace
from typing import Literal

from gtpo_megatron.plan.facts import GPU, Efficiency, Model
from gtpo_megatron.plan.flop import SHARES, Pass, attention_flop

Precision = Literal["bf16", "fp8"]
Recompute = Literal["none", "selective", "matmuls", "full"]
# Additional forward operations of (matrix products, attention), as shares of one forward pass. `selective` is Megatron's (the
# core attention), `matmuls` torchtitan's selective checkpointing by operations (every second product)
AGAIN: dict[Recompute, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "selective": (0.0, 1.0),
    "matmuls": (0.5, 0.0),
    "full": (1.0, 1.0),
}
# Relative errors that outputs carry: somewhat above the largest of docs/planner.md's table for that kind.
UNCERTAINTY = {"dense": 0.15, "mixture": 0.40, "rl": 0.25, "serving": 0.25, "memory": 0.05}


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    sharded: bool = False  # parameters too (FSDP): gathered for every micro-batch
    once_per_node: bool = False  # a token crosses to a node once, however many experts it has there (DeepEP)

    @property
    def data(self) -> int:
        """Replicas of the model."""
        return self.gpus // (self.tensor * self.pipeline * self.context)


@dataclass(frozen=True)
class Work:
    """What a replica does in a step."""

    row: int  # tokens of a sequence, which attention sees
    rows: float  # of a micro-batch
    micro_batches: float
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    eager: bool = False  # no fused kernels
    torch_attention: bool = False  # torch's attention instead of Transformer Engine's
    forward_only: bool = False
    frozen: bool = False  # weights are not trained (LoRA): no gradients of theirs, and no Adam; adapters count as nothing
    offload: bool = False  # Adam's state is in host memory, and the host computes its update

    @property
    def kind(self) -> Pass:
        """What a pass computes."""
        return "forward" if self.forward_only else "frozen" if self.frozen else "training"


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
    stage = _stage(model, gpu, layout, work, reached)
    m = work.micro_batches
    steady = StepTime(**{name: value * m for name, value in vars(stage).items()})
    bubble = steady.total * (layout.pipeline - 1) / (layout.virtual * m)
    if work.forward_only:
        return replace(steady, bubble=bubble)
    trained = 0.0 if work.frozen else _rank_parameters(model, layout) / layout.data
    return replace(
        steady,
        bubble=bubble,
        data=_data(model, gpu, layout, work, reached, stage.total),
        optimizer=_adam(gpu, trained, work.offload, reached),
    )


def _adam(gpu: GPU, parameters: float, offload: bool, reached: Efficiency) -> float:
    """The update of a rank's own parameters: what is moved through memory, the GPU's or its share of the host's.

    Adam moves 28 bytes a parameter. On a GPU bf16 weights are written, too; on the host also the gradient that arrives, and
    the fp32 weight is read again for the bf16 one that leaves.
    """
    if offload:
        return 38 * parameters / (gpu.host_bandwidth * reached.host_memory)
    return 30 * parameters / (gpu.bandwidth * reached.memory)


def _stage(model: Model, gpu: GPU, layout: Layout, work: Work, reached: Efficiency) -> StepTime:
    """Of one micro-batch on an average stage, and what the head adds to the last one."""
    tokens = work.rows * work.row / layout.context
    share = tokens / (layout.tensor * layout.pipeline)
    fast = gpu.bf16 * gpu.power
    bf16 = fast * reached.bf16_matmul
    rate = gpu.fp8 * gpu.power * reached.fp8_matmul if work.precision == "fp8" and gpu.fp8 else bf16
    products, scores = (again / 3 for again in AGAIN[work.recompute])
    whole, attended = SHARES[work.kind]
    part = 1 / 3 if work.forward_only else 1  # of communication and traffic
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
        tensor=_tensor(model, gpu, layout, tokens, reached) * (part + products),
        context=_context(model, gpu, layout, tokens, reached) * (part + products),
        expert=_expert(model, gpu, layout, share, reached) * (part + products),
        imbalance=head * _imbalance(model, layout),
    )


def _imbalance(model: Model, layout: Layout) -> float:
    """What the last stage has of the head beyond the average; none where layers do not divide, and embedding and head count as some."""
    divides = model.layers % (layout.pipeline * layout.virtual) == 0
    return layout.pipeline - 1 if divides else 0


def _bandwidth(gpu: GPU, size: int, stride: int, reached: Efficiency) -> float:
    """Of a ring over `size` ranks that stand `stride` apart: a node's members share its network cards."""
    within = max(1, gpu.node // stride)
    inside, outside = gpu.nvlink * reached.nvlink, gpu.network * reached.network
    return inside if size <= within else min(inside, outside * within)


def _tensor(model: Model, gpu: GPU, layout: Layout, tokens: float, reached: Efficiency) -> float:
    """Of a layer forward and backward: four gathers and four reductions of the hidden states, two bytes an element."""
    size = layout.tensor
    volume = 8 * model.layers / layout.pipeline * tokens * model.hidden * 2 * (size - 1) / size
    return volume / _bandwidth(gpu, size, 1, reached) * reached.exposed_tensor


def _context(model: Model, gpu: GPU, layout: Layout, tokens: float, reached: Efficiency) -> float:
    """Keys and values go round once forward; they and their gradients backward."""
    keys = model.cache_elements / layout.pipeline / layout.tensor
    volume = 3 * keys * 2 * tokens * (layout.context - 1)
    return volume / _bandwidth(gpu, layout.context, layout.tensor, reached) * reached.exposed_context


def _expert(model: Model, gpu: GPU, layout: Layout, share: float, reached: Efficiency) -> float:
    """Tokens to their experts and back, forward and backward. Between nodes a copy crosses its rank's own card."""
    if layout.expert == 1:
        return 0.0
    volume = 4 * model.expert_layers * model.experts_per_token * model.hidden * 2 * share
    remote = max(0.0, 1 - gpu.node / layout.expert)
    near = volume * (1 - 1 / layout.expert - remote) / (gpu.nvlink * reached.nvlink)
    if layout.once_per_node and remote:
        nodes, copies = layout.expert / gpu.node, model.experts_per_token
        remote *= nodes * (1 - (1 - 1 / nodes) ** copies) / copies
    return (near + volume * remote / (gpu.network * reached.network)) * reached.exposed_expert


def _rank_parameters(model: Model, layout: Layout) -> float:
    dense = (model.dense_parameters + model.head_parameters) / (layout.tensor * layout.pipeline)
    experts = model.expert_parameters / layout.pipeline
    return dense + experts / (layout.expert if layout.expert > 1 else layout.tensor)


def _data(
    model: Model, gpu: GPU, layout: Layout, work: Work, reached: Efficiency, micro_batch: float
) -> float:
    """Gradients summed and parameters gathered over the replicas, less what half the backward pass hides."""
    if work.frozen or layout.data * layout.context == 1:
        return 0.0
    size = layout.data * layout.context
    bytes_each = 2 + 2 + 4 if layout.sharded else 4 + 2  # gathered (twice if sharded), gradients in fp32
    times = work.micro_batches if layout.sharded else 1
    seconds = bytes_each * _rank_parameters(model, layout) / _bandwidth(gpu, size, layout.tensor, reached)
    hidden = micro_batch * (2 / 3) * (1 if layout.sharded else layout.pipeline) / 2
    return times * max(seconds - hidden, seconds * reached.exposed_data)


def transfer_seconds(model: Model, gpu: GPU, reached: Efficiency, senders: int = 1) -> float:
    """All weights in bf16 from the trainer to the servers; `senders` stages send theirs at the same time."""
    return model.parameters * 2 / senders / (min(gpu.nvlink, gpu.network) * reached.refit_share)
