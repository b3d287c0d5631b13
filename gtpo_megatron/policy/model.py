"""The policy: a Megatron-Core GPTModel, spread over ranks, with weights from and to Hugging Face by Megatron-Bridge."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gtpo_megatron import control
from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.layout import sequence_alignment
from gtpo_megatron.policy import adapters, platform
from gtpo_megatron.policy.layers.local import CoreAttention, RMSNorm
from gtpo_megatron.policy.mends import bridge as bridge_mends
from gtpo_megatron.policy.mends import engine as engine_mends

with platform.importing_bridge():
    from megatron.bridge import AutoBridge

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


_VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")  # names of Hugging Face
bridge_mends.mend()
engine_mends.mend()


@dataclass(frozen=True)
class Policy:
    """A policy on this rank: its model chunks (one, or several with an interleaved pipeline) and what built them."""

    bridge: AutoBridge
    config: Any  # the bridge's provider, a TransformerConfig
    chunks: list[nn.Module]  # GPTModel in Float16Module (bf16) in DistributedDataParallel (trained policies)
    vocab_size: int  # real vocabulary; the model's may be padded to a multiple of tensor parallelism
    bf16: bool = field(default=False)
    alignment: int = field(default=1)  # tokens of every sequence are padded to a multiple of it
    peft: Any = None  # what attached LoRA adapters, if they are what is trained

    @property
    def last_stage(self) -> nn.Module | None:
        """The GPTModel chunk that ends in the output layer, if this rank holds it."""
        model = unwrap(self.chunks[-1])
        return model if model.post_process else None

    @property
    def modules(self) -> list[nn.Module]:
        """The chunks without their gradient buffers."""
        return [c.module if isinstance(c, DistributedDataParallel) else c for c in self.chunks]

    def without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """The base alone computes inside the context: what LoRA's adapters started from."""
        return self.peft.disable_adapter(self.modules)


def unwrap(module: nn.Module) -> nn.Module:
    """The GPTModel inside its wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module


def initialize_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Make Megatron's process groups over the world that torch.distributed has."""
    with platform.gloo_interface():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1 if parallel.expert > 1 else None,
            distributed_timeout_minutes=control.STEP_LIMIT.total_seconds() / 60,
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def build_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    trained: bool = True,
    distributed_optimizer: bool = False,
    load_weights: bool = True,
) -> Policy:
    """Build the policy in this rank's part of the layout, and load the Hugging Face weights.

    `trained=False` gives a frozen policy without gradient buffers (a reference policy, a conversion), and without
    adapters. With `model.lora` the adapters alone are trained, and have gradient buffers.
    Raises UserError for an architecture that Megatron-Bridge does not know.
    """
    try:
        bridge = AutoBridge.from_hf_pretrained(model.path, dtype=DTYPES[model.dtype])
        provider = bridge.to_megatron_provider(load_weights=False)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path: {model.path}: {error}") from error
    vocab_size = provider.vocab_size
    _configure(provider, model, parallel, training, distributed_optimizer)
    if not platform.use_transformer_engine(model.layers):
        _without_transformer_engine(provider)
    elif provider.deterministic_mode:
        platform.use_deterministic_kernels()
    provider.finalize()
    with contextlib.redirect_stdout(io.StringIO()):  # the bridge prints progress on every rank
        modules = provider.provide_distributed_model(
            wrap_with_ddp=False,
            mixed_precision_wrapper=Float16Module,
            use_cpu_initialization=not platform.HAS_CUDA,
        )
        if load_weights:
            engine_mends.forget_made_values(modules)
            with torch.no_grad():  # `data` of weights in blocks of FP8 is the weight itself
                bridge.load_hf_weights(modules)
            engine_mends.start_from_loaded(bridge, modules, distributed_optimizer and trained)
    for module in modules:
        _emit_hidden_states(unwrap(module))
        _match_rope(unwrap(module), bridge.hf_pretrained.config)
        engine_mends.mark_expert_shards(module)
    bf16 = model.dtype == "bf16"
    alignment = sequence_alignment(parallel, fp8=model.fp8.enabled)
    if not trained:
        for module in modules:
            module.requires_grad_(False).eval()
        return Policy(bridge, provider, modules, vocab_size, bf16, alignment)
    peft = adapters.attach(bridge, modules, model.lora, training.seed) if model.lora else None
    chunks = [_data_parallel(m, provider, training, distributed_optimizer, i) for i, m in enumerate(modules)]
    return Policy(bridge, provider, chunks, vocab_size, bf16, alignment, peft)


def _configure(
    provider: Any,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    distributed_optimizer: bool,
) -> None:
    dtype = DTYPES[model.dtype]
    provider.tensor_model_parallel_size = parallel.tensor
    provider.pipeline_model_parallel_size = parallel.pipeline
    provider.virtual_pipeline_model_parallel_size = parallel.virtual_pipeline
    provider.context_parallel_size = parallel.context
    provider.expert_model_parallel_size = parallel.expert
    provider.expert_tensor_parallel_size = 1 if parallel.expert > 1 else None
    provider.sequence_parallel = parallel.sequence
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = model.dtype == "bf16", False
    if model.fp8.enabled:
        provider.fp8, provider.fp8_recipe = model.fp8.format, model.fp8.recipe
        provider.fp8_param = model.fp8.param
        provider.first_last_layers_bf16 = model.fp8.first_last_bf16
        provider.num_layers_at_start_in_bf16 = provider.num_layers_at_end_in_bf16 = 1
    # pad the vocabulary no further than tensor parallelism needs; the head masks the padding
    provider.should_pad_vocab, provider.make_vocab_size_divisible_by = True, 1
    provider.hidden_dropout = provider.attention_dropout = 0.0
    # packed rows have no fixed length; with it, the pipeline exchanges shapes before tensors
    provider.variable_seq_lengths = True
    provider.moe_token_dispatcher_type = "alltoall"
    provider.moe_aux_loss_coeff = 0.0
    provider.moe_router_load_balancing_type = "none"
    # the loss arrives normalised over the whole batch: gradients are summed over ranks, never averaged
    provider.calculate_per_token_loss = True
    # adapters are too small for it to matter, and frozen weights have no buffer
    provider.gradient_accumulation_fusion = not model.lora and platform.use_fused_weight_gradient()
    provider.attention_softmax_in_fp32 = True
    provider.deterministic_mode = training.deterministic and platform.HAS_CUDA
    if training.recompute == "full":
        provider.recompute_granularity, provider.recompute_method, provider.recompute_num_layers = (
            "full",
            "uniform",
            1,
        )
    elif training.recompute == "selective":
        provider.recompute_granularity = "selective"
    if parallel.virtual_pipeline:
        # the interleaved schedule frees an output that gloo may still be sending; and it needs overlapped sends
        provider.deallocate_pipeline_outputs = platform.HAS_CUDA
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    elif not platform.HAS_CUDA:
        provider.batch_p2p_comm = False
    if distributed_optimizer and training.overlap_grad_reduce:
        provider.overlap_grad_reduce = True


def _without_transformer_engine(provider: Any) -> None:
    """Megatron-Core's local layers, with torch's attention and norms; the fusions need kernels that are not here."""
    provider.transformer_layer_spec = _local_block_spec
    provider.masked_softmax_fusion = provider.bias_activation_fusion = provider.bias_dropout_fusion = False
    provider.apply_rope_fusion = provider.persist_layer_norm = provider.cross_entropy_loss_fusion = False
    provider.moe_grouped_gemm = provider.moe_permute_fusion = False
    provider.moe_router_fusion = False


def _local_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def _emit_hidden_states(model: nn.Module) -> None:
    """Let the last stage return final hidden states [1, t, hidden]; the loss head applies the output weight itself."""
    if model.post_process:
        model.output_layer.forward = lambda hidden, weight=None, **_: (hidden, None)


def _match_rope(model: nn.Module, hf_config: Any) -> None:
    """Take the rotary frequencies of Llama-3 scaling from the checkpoint's own parameters.

    Megatron-Core knows the scaling factor but fixes the other three parameters at Llama 3.1's values: a checkpoint with
    others would run, silently wrong.
    """
    parameters = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"config.json: rope_type {kind!r} is not supported; supported: default, llama3")
    if kind == "llama3" and hasattr(model, "rotary_pos_emb"):
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, torch.device("cpu"))
        model.rotary_pos_emb.inv_freq.copy_(frequencies)


def output_weight(model: nn.Module) -> nn.Parameter:
    """This rank's shard [vocabulary / tp, hidden] of the output weight of a last-stage GPTModel."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _data_parallel(
    module: nn.Module, config: Any, training: TrainingConfig, distributed_optimizer: bool, index: int
) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        grad_reduce_in_fp32=config.params_dtype != torch.float64,  # float64: the layout tests
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=False,
        fp8_param_gather=bool(config.fp8 and config.fp8_param and distributed_optimizer),
        check_for_nan_in_grad=False,  # the step checks, skips and counts; an assertion would end the run
    )
    return DistributedDataParallel(config, ddp, module, disable_bucketing=index > 0)


def export_hf_weights(policy: Policy, *, cpu: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Stream (Hugging Face name, whole tensor on the CPU, or on the weights' device), adapters merged into the weights.

    Collective: every rank must drain it; all get all tensors.
    """
    for name, tensor in policy.bridge.export_hf_weights(policy.modules, cpu=cpu, show_progress=False):
        yield name, without_padding(policy, name, tensor).detach()


def without_padding(policy: Policy, name: str, tensor: Tensor) -> Tensor:
    """An exported weight without the rows that fill the vocabulary up; a view."""
    return tensor[: policy.vocab_size] if name.endswith(_VOCABULARY_WEIGHTS) else tensor


def is_reporting_rank() -> bool:
    """Whether this rank speaks for its data-parallel replica: last stage, first of its tensor and context groups."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def world_rank() -> int:
    """Global rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0
