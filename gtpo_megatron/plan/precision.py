"""Rules on number formats and layers: what contradicts itself, and what this machine or this model's sizes cannot do."""

from collections.abc import Iterator

from gtpo_megatron.config import Fp8Config, ParallelConfig, RunConfig
from gtpo_megatron.machine.probe import FP8_NEEDS, Machine
from gtpo_megatron.plan.layout import HFShape, expert_tensor_size

FP8_MULTIPLE = 16  # of both sizes of every matrix: cuBLAS wants leading dimensions of 16 bytes
# From so many sequences x heads x longest^2 on, Transformer Engine 2.20 takes no deterministic attention of cuDNN for packed
# rows on Hopper: its backward would ask for 128 bytes for each. What is left without flash-attn holds all scores.
ATTENTION_SCORES = 2**30
HOPPER = (9, 0)


def fp8_settings_problems(config: RunConfig) -> Iterator[str]:
    """FP8 settings that contradict others, or would have no effect."""
    fp8 = config.model.fp8
    if not fp8.enabled:
        for key, value in fp8.changed():
            yield (
                f"model.fp8.{key}: {value} has no effect with model.fp8.format: none; set a format (hybrid, e4m3) or drop it"
            )
        return
    if config.model.dtype != "bf16":
        yield f"model.fp8.format: {fp8.format} needs model.dtype: bf16, not {config.model.dtype}"
    if config.model.layers == "local":
        yield f"model.fp8.format: {fp8.format} needs Transformer Engine's layers, not model.layers: local"
    if config.model.lora:
        yield f"model.fp8.format: {fp8.format} with model.lora is not supported; set model.fp8=none or model.lora=null"
    if fp8.recipe == "delayed":
        yield from _delayed_problems(config)


def precision_problems(config: RunConfig, shape: HFShape, machine: Machine) -> Iterator[str]:
    """Number formats and layers that this machine cannot run."""
    if machine.engine_fault:
        yield machine.engine_fault
    fp8 = config.model.fp8
    wants = [("model.fp8.format", fp8.format)] if fp8.enabled else []
    if config.model.layers == "transformer_engine":
        wants.append(("model.layers", "transformer_engine"))
    for key, value in wants:
        if not machine.transformer_engine:
            yield f"{key}: {value} needs Transformer Engine, which is not installed here (see gtpo-megatron doctor)"
        if machine.cuda_capability is None:
            yield f"{key}: {value} needs a CUDA GPU; there is none here"
    yield from _attention_problems(config, shape, machine)
    if fp8.enabled:
        yield from _machine_problems(fp8, machine)
        yield from _shape_problems(fp8, config.parallel, shape)


def _attention_problems(config: RunConfig, shape: HFShape, machine: Machine) -> Iterator[str]:
    """Transformer Engine's attention of last resort: its memory grows with the square of the longest sequence, and it
    computes nothing over context ranks.
    """
    if machine.cuda_capability is None or not machine.transformer_engine or config.model.layers == "local":
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    sequences = max(config.training.micro_batch_tokens // longest, 1)
    heads = shape.heads // config.parallel.tensor
    scores = sequences * heads * longest**2
    context = config.parallel.context
    if config.model.dtype == "fp32":
        reason = "model.dtype: fp32 leaves Transformer Engine"
        advice = "take model.dtype: bf16 or model.layers: local"
        if context > 1:
            yield f"{reason} no attention over context ranks (parallel.context: {context}); {advice}"
            return
    elif config.training.deterministic and machine.cuda_capability == HOPPER and not machine.flash_attention:
        reason = (
            "training.deterministic: true without flash-attn leaves Transformer Engine, at these lengths,"
        )
        advice = "install flash-attn (requirements/cluster.txt), or set training.deterministic: false"
    else:
        return
    if scores < ATTENTION_SCORES:
        return
    size = f"{sequences} sequences x {heads} heads x {longest} tokens squared"
    if context > 1:
        yield f"{reason} no attention over context ranks (parallel.context: {context}; {size}); {advice}"
    else:
        yield (
            f"{reason} only an attention that holds all scores: {size}, {scores * 4 / 2**30:.0f} GiB in float32 for each "
            f"layer; {advice}"
        )


def _delayed_problems(config: RunConfig) -> Iterator[str]:
    """Delayed scaling moves its scales in passes with gradients only, so a pass without has other scales than the next."""
    algorithm = config.algorithm
    if config.model.fp8.first_last_bf16:
        yield (
            "model.fp8.first_last_bf16: true does not go with model.fp8.recipe: delayed, which Megatron-Core "
            "applies to all layers or none; take tensorwise or blockwise"
        )
    compared = {
        "algorithm.kl_beta": algorithm.kl_beta > 0,
        "algorithm.importance.level": algorithm.importance.level != "off",
        "algorithm.updates_per_batch": algorithm.updates_per_batch > 1
        and algorithm.old_logprobs == "trainer",
    }
    for key in (key for key, holds in compared.items() if holds):
        yield (
            f"{key} compares logprobs, and with model.fp8.recipe: delayed a token's logprob depends on the pass before, "
            "whose scales it takes: rounding would look like a change of the policy; take tensorwise or blockwise"
        )


def _machine_problems(fp8: Fp8Config, machine: Machine) -> Iterator[str]:
    capability, cuda = FP8_NEEDS[fp8.recipe]
    needs = (
        ("compute capability", machine.cuda_capability, capability),
        ("a torch built for CUDA", machine.cuda_version, cuda),
    )
    for what, found, least in needs:
        if found is not None and found < least:
            yield (
                f"model.fp8.recipe: {fp8.recipe} needs {what} {_version(least)} or higher; here it is {_version(found)}"
            )


def _version(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


def _shape_problems(fp8: Fp8Config, parallel: ParallelConfig, shape: HFShape) -> Iterator[str]:
    mlp = shape.expert_ffn // expert_tensor_size(parallel) if shape.experts else shape.ffn // parallel.tensor
    sizes = {
        "hidden size": shape.hidden,
        "attention width per rank": shape.heads * shape.head_dim // parallel.tensor,
        "MLP width per rank": mlp,
    }
    for what, size in sizes.items():
        if size % FP8_MULTIPLE:
            yield (
                f"model.fp8.format: {fp8.format} needs matrix sizes that are multiples of {FP8_MULTIPLE}; "
                f"{what} is {size}"
            )
