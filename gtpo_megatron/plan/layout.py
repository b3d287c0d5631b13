"""Which rank holds what: coordinates and parameter counts per rank, computed from the shape alone, with no model built."""

from dataclasses import dataclass
from typing import Any

from gtpo_megatron.config import ParallelConfig

# Transformer Engine's layers take multiples of 8 tokens; the product that gives the weight's gradient, where tokens are
# the inner dimension, takes multiples of 16 (cuBLAS: FP8 operands have leading dimensions of 16 bytes).
FP8_TOKENS = 16


@dataclass(frozen=True)
class HFShape:
    """The sizes in a Hugging Face config.json that decide layout and parameter count."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # of a dense layer; unused in mixtures of experts
    vocab: int
    max_positions: int
    tied: bool  # output layer shares the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    expert_ffn: int = 0


@dataclass(frozen=True)
class RankPlace:
    """A global rank's coordinates in Megatron's default order tp-cp-ep-dp-pp (tensor fastest, pipeline slowest)."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class ParameterCount:
    """Parameters on one rank. Experts are counted apart: another group of ranks shares their optimizer state."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def hf_shape(config: Any) -> HFShape:
    """The shape of a transformers config of a supported architecture."""
    architecture = config.architectures[0]
    heads = config.num_attention_heads
    mixture = architecture == "Qwen3MoeForCausalLM"
    return HFShape(
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture.startswith("Qwen3"),
        experts=config.num_experts if mixture else 0,
        experts_per_token=config.num_experts_per_tok if mixture else 0,
        expert_ffn=config.moe_intermediate_size if mixture else 0,
    )


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Tensor parallelism inside an expert: none once experts are spread over ranks."""
    return 1 if parallel.expert > 1 else parallel.tensor


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model, context-parallel ranks not counted."""
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that hold the layout."""
    dense = parallel.tensor * parallel.context
    return parallel.pipeline * max(dense, -(-parallel.expert // dense) * dense)


def rank_layout(parallel: ParallelConfig, world_size: int) -> tuple[RankPlace, ...]:
    """Coordinates of every rank; world_size must be divisible as `preflight.check_run` demands."""
    data = data_parallel_size(parallel, world_size)
    stage = world_size // parallel.pipeline
    return tuple(
        RankPlace(
            rank=rank,
            tensor=rank % parallel.tensor,
            context=rank // parallel.tensor % parallel.context,
            data=rank // (parallel.tensor * parallel.context) % data,
            pipeline=rank // stage,
            expert=rank % stage // expert_tensor_size(parallel) % parallel.expert,
        )
        for rank in range(world_size)
    )


def stage_layers(layers: int, parallel: ParallelConfig, pipeline_rank: int) -> tuple[int, ...]:
    """Layer numbers (from 0) of a pipeline rank, chunk after chunk where the pipeline is interleaved."""
    chunks = parallel.virtual_pipeline or 1
    size = layers // (parallel.pipeline * chunks)
    starts = (size * (chunk * parallel.pipeline + pipeline_rank) for chunk in range(chunks))
    return tuple(layer for start in starts for layer in range(start, start + size))


def sequence_alignment(parallel: ParallelConfig, *, fp8: bool) -> int:
    """Every sequence is padded to a multiple of this, so that a packed row splits evenly over context and sequence ranks.

    With FP8 each rank's share has a multiple of FP8_TOKENS tokens too.
    """
    ranks = parallel.tensor if parallel.sequence else 1
    if fp8:
        return (
            FP8_TOKENS * ranks * parallel.context
        )  # even shares, as the zigzag of context parallelism needs
    return ranks * (2 * parallel.context if parallel.context > 1 else 1)


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary is padded no further than to a multiple of tensor parallelism."""
    return -(-vocab // tensor) * tensor


def rank_parameters(shape: HFShape, parallel: ParallelConfig, pipeline_rank: int) -> ParameterCount:
    """Parameters on any one rank of a pipeline stage; all its ranks hold equally many."""
    tensor, hidden = parallel.tensor, shape.hidden
    layers = len(stage_layers(shape.layers, parallel, pipeline_rank))
    first, last = pipeline_rank == 0, pipeline_rank == parallel.pipeline - 1
    embedding = padded_vocab(shape.vocab, tensor) // tensor * hidden
    # a tied output layer is one tensor with the embedding only where both are on the same rank; else it is a copy
    dense = layers * _dense_layer(shape, tensor) + first * embedding
    dense += last * (hidden + (0 if shape.tied and first else embedding))
    expert = (
        layers
        * shape.experts
        // parallel.expert
        * 3
        * hidden
        * shape.expert_ffn
        // expert_tensor_size(parallel)
    )
    return ParameterCount(dense, expert)


def model_parameters(shape: HFShape) -> int:
    """Parameters of the whole model, as Hugging Face counts them (tied weights once)."""
    return rank_parameters(shape, ParallelConfig(), 0).total


def rank_state_bytes(
    count: ParameterCount,
    parallel: ParallelConfig,
    world_size: int,
    *,
    bf16: bool,
    distributed_optimizer: bool,
    offload: bool = False,
    adapters: int = 0,
) -> int:
    """Bytes of weights, fp32 gradient buffer and Adam state on a rank; activations and buffers of the head not counted.

    Adam keeps two fp32 moments, and an fp32 copy of bf16 weights; the distributed optimizer shards these over the ranks
    that hold the same parameters, and with `offload` they are in host memory. With `adapters`, a number of LoRA parameters
    on the rank, they alone are trained.
    """
    replicas = data_parallel_size(parallel, world_size) * parallel.context
    expert_replicas = world_size // (parallel.pipeline * parallel.expert * expert_tensor_size(parallel))
    resident, optimizer = (2 + 4, 4 + 8) if bf16 else (4 + 4, 8)
    if offload:
        optimizer = 0

    def state(parameters: int, shards: int) -> int:
        return parameters * resident + parameters * optimizer // (shards if distributed_optimizer else 1)

    if adapters:
        return count.total * (2 if bf16 else 4) + state(adapters, replicas)
    return state(count.dense, replicas) + state(count.expert, expert_replicas)


def _dense_layer(shape: HFShape, tensor: int) -> int:
    """Parameters of one layer on one tensor-parallel rank, experts aside."""
    queries, keys_and_values = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    attention = (queries + keys_and_values) * (shape.hidden + shape.qkv_bias) + queries * shape.hidden
    norms = 2 * shape.hidden + 2 * shape.head_dim * shape.qk_norm
    router = shape.experts * shape.hidden
    mlp = 0 if shape.experts else 3 * shape.hidden * shape.ffn
    return (attention + mlp) // tensor + norms + router
