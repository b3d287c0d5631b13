"""Bytes on a GPU by what holds them, on the pipeline stage that holds most.

Weights, gradients and Adam are exact (`layout`). Activations are counted operation by operation, as what each saves for its
backward pass; the layers that stand without Transformer Engine are checked against torch's saved-tensor hooks in a real run
(tests/plan/test_memory.py). With fused layers and f = 4h this is about the 34 bytes a token and hidden unit of Korthikanti et
al. 2022 (arXiv:2205.05198, equation 1). How many micro-batches are in flight follows from Megatron's schedules (1F1B, and the
interleaved one with its warm-up of 2 (p - rank - 1) + (v - 1) p chunks).
"""

from dataclasses import dataclass

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.facts import GPU, Model, of_shape
from gtpo_megatron.plan.layout import (
    HFShape,
    data_parallel_size,
    expert_tensor_size,
    rank_parameters,
)
from gtpo_megatron.plan.lora import adapter_parameters
from gtpo_megatron.plan.work import Layout, Recompute, Work

GIB = 2**30
RUNTIME = 1.5 * GIB  # CUDA context, kernels and NCCL's buffers: usual on H100, differs with driver and groups
ASLEEP = 1.5 * GIB  # a server without its memory: CUDA context, graphs, NCCL's buffers. Nobody's measurement
HEAD_WORKSPACE = 1 << 30  # policy.head.tiles.WORKSPACE_BYTES["cuda"]; a test holds them equal


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each GPU of a pipeline stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float  # workspace and float32 gradient of the hidden states
    buckets: float  # weights on their way to the servers
    runtime: float
    host: float = 0.0  # in host memory for this GPU's rank, no part of the total: Adam's state and gradients on their way to it
    server: float = 0.0  # that shares the GPU, and has given up its memory

    @property
    def parts(self) -> dict[str, float]:
        left_out = {"stage", "host"} | (set() if self.server else {"server"})
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @property
    def while_sampling(self) -> float:
        """What is left while a server has the GPU's memory: gradients and the optimizer's state are lent, nothing is computed."""
        return self.weights + self.buckets + self.runtime + self.server

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def layer_elements(
    shape: HFShape, tensor: int, *, sequence: bool, fused: bool, recompute: Recompute = "none"
) -> float:
    """Elements that a layer saves for its backward pass, for each token of the rank's part of the sequences.

    `fused`: Transformer Engine's layers; else Megatron-Core's local ones with torch's norms and attention, whose norm keeps
    the normalised input as well, and whose SwiGLU keeps every intermediate. Experts are taken as evenly loaded, spread over
    as many ranks as share the tokens.
    """
    hidden = shape.hidden / (tensor if sequence else 1)
    if recompute == "full":
        return hidden
    q, k = shape.heads * shape.head_dim / tensor, shape.kv_heads * shape.head_dim / tensor
    norms = (4 if fused else 6) * hidden  # input and output of each; and what is normalised
    attention = (q + 2 * k) + (q + k)  # projections together (values are a view), rotated queries and keys
    attention += (1 if fused else 2) * q  # output, and a copy as input of the projection
    statistics = shape.heads / tensor + 2
    if recompute == "selective":  # output and logsumexp of the core attention are computed again
        attention -= 0 if fused else q
        statistics -= shape.heads / tensor
    if shape.qk_norm:
        attention += (
            q if shape.kv_heads > tensor else 0
        )  # a copy: queries of several groups do not lie together
        attention += 0 if fused else q + k
    rotary = 0 if fused else 4 * shape.head_dim
    if not shape.experts:
        return norms + attention + rotary + statistics + (3 if fused else 5) * shape.ffn / tensor
    # each token goes to its experts in copies, shared by the tensor-parallel ranks
    copies = shape.experts_per_token / tensor
    expert = copies * ((3 if fused else 5) * shape.expert_ffn + (2 if fused else 1) * shape.hidden)
    router = hidden + 4 * shape.experts / (tensor if sequence else 1)
    return norms + attention + rotary + statistics + expert + router


def chunks_in_flight(pipeline: int, virtual: int, rank: int, micro_batches: int) -> int:
    """Forward passes of a chunk that a pipeline rank holds at most before their backward passes."""
    if virtual == 1:
        return min(micro_batches, pipeline - rank)
    return min(micro_batches * virtual, (virtual - 1) * pipeline + 2 * (pipeline - rank - 1) + 1)


def training_memory(
    config: RunConfig, shape: HFShape, world_size: int, micro_batches: int
) -> tuple[RankMemory, ...]:
    """Bytes on a GPU of each pipeline stage while a full micro-batch is trained on; Transformer Engine's layers unless local."""
    return tuple(
        _stage_memory(config, shape, world_size, micro_batches, stage)
        for stage in range(config.parallel.pipeline)
    )


def _stage_memory(
    config: RunConfig, shape: HFShape, world_size: int, micro_batches: int, stage: int
) -> RankMemory:
    parallel, bf16 = config.parallel, config.model.dtype == "bf16"
    count = rank_parameters(shape, parallel, stage)
    item = 2 if bf16 else 4
    replicas = data_parallel_size(parallel, world_size) * parallel.context
    expert_replicas = world_size // (parallel.pipeline * parallel.expert * expert_tensor_size(parallel))
    shards = (replicas, expert_replicas) if config.optimizer.distributed else (1, 1)
    adam = 12 if bf16 else 8
    tokens = config.training.micro_batch_tokens / parallel.context
    last = stage == parallel.pipeline - 1
    hidden = tokens * shape.hidden
    lora, sglang = config.model.lora, config.rollout.sglang
    trained, optimizer = count.total, adam * (count.dense / shards[0] + count.expert / shards[1])
    copies = 2 if config.algorithm.kl_beta else 1  # the reference policy
    weights = count.total * copies * item
    if lora is not None:  # the base is the reference policy; activations are counted as without adapters
        trained = adapter_parameters(shape, lora, parallel, stage)
        weights, optimizer = (count.total + trained) * item, adam * trained / shards[0]
    sends = config.rollout.engine == "sglang"
    offload = config.optimizer.offload  # in bf16 alone: 12 bytes of Adam's, and 4 of a gradient
    together = config.rollout.placement == "together"
    return RankMemory(
        stage,
        weights=weights,
        gradients=trained * 4,
        optimizer=0 if offload else optimizer,
        activations=_activations(config, shape, stage, tokens, micro_batches) * item,
        head=(HEAD_WORKSPACE + hidden * (4 + item)) if last else 0,
        buckets=2 * sglang.bucket_mb * 2**20 if sends else 0,  # one that fills, one on its way
        runtime=RUNTIME,
        host=optimizer * 16 / 12 if offload else optimizer if together else 0.0,
        server=ASLEEP if together else 0.0,
    )


def _activations(config: RunConfig, shape: HFShape, stage: int, tokens: float, micro_batches: int) -> float:
    """Elements on a rank: of all chunks in flight, and of the layer that is just computed again."""
    parallel = config.parallel
    recompute, fused = config.training.recompute, config.model.layers != "local"
    virtual = parallel.virtual_pipeline or 1
    layers = shape.layers // (parallel.pipeline * virtual)
    kept = layer_elements(
        shape, parallel.tensor, sequence=parallel.sequence, fused=fused, recompute=recompute
    )
    flying = chunks_in_flight(parallel.pipeline, virtual, stage, micro_batches)
    again = 0.0
    if recompute == "full":
        again = layer_elements(shape, parallel.tensor, sequence=parallel.sequence, fused=fused)
    # gradients of one layer's activations, and the last stage's norm, come and go
    return tokens * (kept * layers * flying + again + 2 * shape.hidden / parallel.tensor)


def sharded_training_peak(model: Model, layout: Layout, work: Work) -> float:
    """Peak bytes of torchtitan's training of a dense model: everything float32 and sharded (FSDP), bfloat16 where gathered.

    Its peak is what torch's allocator reserved. Logits are held whole: 14 bytes each (bfloat16, and float32 three times over:
    logits, logsoftmax, gradient), which dominates. `work.recompute` matmuls keeps the input of a layer, every second product
    and the attention's output; one layer's working set is on top, almost three times as large where nothing is fused.
    """
    tokens = work.rows * work.row / layout.context
    share = layout.tensor
    replicas = layout.data * layout.context
    h, f = model.hidden, model.ffn
    keys = model.kv_heads * model.head_dim
    states = 16 * model.parameters / (share * replicas)
    layer = (model.dense_parameters / model.layers) / share
    gathered = 2 * (2 * model.head_parameters / share + 2 * layer)
    kept = {
        "full": h,
        "matmuls": h + model.query_width + keys + model.value_width + f + h,
    }.get(work.recompute, 4 * h + 3 * model.query_width + 3 * keys + 3 * f)
    working = (36 if work.eager else 13) * h
    elements = tokens * (kept * model.layers + working) / share
    return states + gathered + 2 * elements + 14 * tokens * model.vocab / share


def smallest_server(shape: HFShape, gpu: GPU, longest: int) -> int:
    """The fewest GPUs (a power of two) on which the weights leave room for eight of the longest sequences; 0 if four nodes do not."""
    from gtpo_megatron.plan.sampling import Server

    model, tensor = of_shape(shape, ""), 1
    while tensor <= 4 * gpu.node:
        if shape.heads % tensor == 0 and Server(model, gpu, tensor).cached_tokens >= 8 * longest:
            return tensor
        tensor *= 2
    return 0
