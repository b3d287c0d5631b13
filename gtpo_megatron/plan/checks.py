"""What can be known to be wrong before a model is built: the run against its checkpoint's config.json and this machine."""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from gtpo_megatron.config import ParallelConfig, RewardTerm, RunConfig, TrainingConfig
from gtpo_megatron.data.rows import resolve_source
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine.probe import Machine, this_machine
from gtpo_megatron.plan.absent import Part
from gtpo_megatron.plan.evaluation import evaluation_length_problems, evaluation_problems
from gtpo_megatron.plan.hub import read_config
from gtpo_megatron.plan.layout import (
    HFShape,
    data_parallel_size,
    expert_tensor_size,
    hf_shape,
    sequence_alignment,
)
from gtpo_megatron.plan.lora import lora_problems
from gtpo_megatron.plan.offload import offload_problems
from gtpo_megatron.plan.placement import placement_machine_problems, placement_problems
from gtpo_megatron.plan.precision import fp8_settings_problems, precision_problems
from gtpo_megatron.plan.rollout import engine_problems, server_problems
from gtpo_megatron.rewards.terms import check_options, import_function, term_function

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def check_run(
    config: RunConfig, world_size: int, machine: Machine | None = None, *, without: Collection[Part] = ()
) -> HFShape:
    """Check every rule that needs no model; takes seconds.

    `without` names parts that a dry run does without (`absent_parts`); the rules on them are left out.

    Raises:
        UserError: naming all broken rules at once, each with key, value and rule.
    """
    machine = machine or this_machine()
    problems = [*settings_problems(config), *server_problems(config, machine)]
    problems += placement_machine_problems(config, world_size, machine)
    problems += _raised(lambda: resolve_source(config.data))
    problems += evaluation_problems(config)
    problems += [*reward_problems(config), *profile_problems(config.training, world_size)]
    shape = None
    try:
        shape = read_shape(config.model.path)
    except UserError as error:
        problems.append(str(error))
    if shape is not None:
        problems += layout_problems(config.parallel, shape, world_size)
        problems += length_problems(config, shape)
        problems += evaluation_length_problems(config, shape)
        problems += precision_problems(config, shape, machine)
        problems += batch_problems(config, world_size)
        problems += lora_problems(config, shape)
        if "weights" not in without:
            problems += checkpoint_problems(Path(config.model.path))
        if "tokenizer" not in without:
            problems += _raised(lambda: _check_tokenizer(config, shape))
    if problems:
        header = [f"{len(problems)} problems with this run:"] if len(problems) > 1 else []
        raise UserError("\n  ".join([*header, *problems]))
    return shape


def read_shape(path: str) -> HFShape:
    """The shape of a supported checkpoint, from its config.json alone (a local directory or a hub name)."""
    config = read_config(path)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model.path: {path}: {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if unsupported := _unsupported_variant(config):
        raise UserError(
            f"model.path: {path}: config.json has {unsupported}, which the Megatron model does not have"
        )
    return hf_shape(config)


def settings_problems(config: RunConfig) -> Iterator[str]:
    """Settings that contradict each other, or that would silently have no effect."""
    rollout, server = config.rollout, config.rollout.sglang
    sampled = config.algorithm.name != "sft"
    yield from engine_problems(rollout)
    yield from placement_problems(config)
    off_policy = config.algorithm.importance.level != "off" or config.algorithm.old_logprobs == "sampler"
    if server.partial and rollout.oversample > 1 and not off_policy:
        yield (
            "rollout.sglang.partial: true with rollout.oversample trains on tokens of older weights: set "
            "algorithm.importance.level: token (or sequence), or algorithm.old_logprobs: sampler"
        )
    if sampled and rollout.staleness and not off_policy:
        yield (
            f"rollout.staleness: {rollout.staleness} trains on completions of older weights: set "
            "algorithm.importance.level: token (or sequence), or algorithm.old_logprobs: sampler"
        )
    if not sampled and rollout.staleness:
        yield f"rollout.staleness: {rollout.staleness} has no meaning with algorithm.name: sft, which samples nothing"
    importance = config.algorithm.importance.level
    if importance != "off" and not sampled:
        yield f"algorithm.importance.level: {importance} has no meaning with algorithm.name: sft, which samples nothing"
    elif importance != "off" and config.algorithm.old_logprobs == "sampler":
        yield (
            f"algorithm.importance.level: {importance} has no effect with algorithm.old_logprobs: sampler, whose likelihood "
            "ratio is already that to the sampler; drop one of the two"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield f"optimizer.min_lr: {config.optimizer.min_lr} is above optimizer.lr: {config.optimizer.lr}"
    if config.optimizer.warmup_steps > config.training.steps:
        yield (
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps} is above training.steps: {config.training.steps}; "
            "the learning rate would never be reached"
        )
    yield from offload_problems(config)
    yield from fp8_settings_problems(config)


def profile_problems(training: TrainingConfig, world_size: int) -> Iterator[str]:
    """Steps and ranks to be traced that there will not be."""
    profile = training.profile
    if wrong := [step for step in profile.steps if not 1 <= step <= training.steps]:
        yield (
            f"training.profile.steps: {wrong[0]} is no step of this run; they are 1 to training.steps: {training.steps}"
        )
    if not profile.steps and profile.ranks != type(profile)().ranks:
        yield f"training.profile.ranks: {list(profile.ranks)} has no effect without training.profile.steps"
    elif wrong := [rank for rank in profile.ranks if not 0 <= rank < world_size]:
        yield f"training.profile.ranks: {wrong[0]} is no rank of this run; they are 0 to {world_size - 1}"
    elif not profile.ranks:
        yield "training.profile.ranks: empty, so that no rank is traced; name one, e.g. [0]"


def layout_problems(parallel: ParallelConfig, shape: HFShape, world_size: int) -> Iterator[str]:
    """Sizes that do not divide over the ranks."""
    tensor = parallel.tensor
    for what, size in (("attention heads", shape.heads), ("key/value heads", shape.kv_heads)):
        if size % tensor:
            yield _indivisible("parallel.tensor", tensor, f"{size} {what}", size)
    if not shape.experts and shape.ffn % tensor:
        yield _indivisible("parallel.tensor", tensor, f"{shape.ffn} units of the MLP", shape.ffn)
    if shape.experts and shape.expert_ffn % expert_tensor_size(parallel):
        yield _indivisible(
            "parallel.tensor", tensor, f"{shape.expert_ffn} units of an expert", shape.expert_ffn
        )
    if parallel.sequence and shape.hidden % tensor:
        yield _indivisible("parallel.tensor", tensor, f"hidden size {shape.hidden}", shape.hidden)

    chunks = parallel.virtual_pipeline or 1
    if shape.layers % parallel.pipeline:
        yield _indivisible("parallel.pipeline", parallel.pipeline, f"{shape.layers} layers", shape.layers)
    elif shape.layers % (parallel.pipeline * chunks):
        per_rank = shape.layers // parallel.pipeline
        what = f"{per_rank} layers of a pipeline rank"
        yield _indivisible("parallel.virtual_pipeline", chunks, what, per_rank, least=2)

    if parallel.expert > 1 and not shape.experts:
        yield f"parallel.expert: {parallel.expert}: {shape.architecture} has no experts; set it to 1"
    elif shape.experts and shape.experts % parallel.expert:
        yield _indivisible("parallel.expert", parallel.expert, f"{shape.experts} experts", shape.experts)
    if shape.experts and tensor > 1 and not parallel.sequence:
        yield f"parallel.tensor: {tensor} with experts needs parallel.sequence: true"

    model = tensor * parallel.pipeline * parallel.context
    if world_size % model:
        yield (
            f"the world has {world_size} rank{'s' * (world_size != 1)}, not a multiple of parallel.tensor x pipeline x context "
            f"= {tensor} x {parallel.pipeline} x {parallel.context} = {model}; "
            f"start {model} ranks (torchrun --nproc-per-node {model}) or a multiple, or lower them"
        )
    experts = expert_tensor_size(parallel) * parallel.expert * parallel.pipeline
    if parallel.expert > 1 and shape.experts and world_size % experts:
        yield (
            f"parallel.expert: {parallel.expert}: the world of {world_size} is not a multiple of "
            f"expert x pipeline = {parallel.expert} x {parallel.pipeline}"
        )


def length_problems(config: RunConfig, shape: HFShape) -> Iterator[str]:
    """Prompts and completions that fit neither the model's positions nor a micro-batch."""
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    longest = prompt + completion
    asked = f"data.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {completion} = {longest}"
    if longest > shape.max_positions:
        yield f"{asked}: above the model's {shape.max_positions} positions (max_position_embeddings); lower one of them"
    alignment = sequence_alignment(config.parallel, fp8=config.model.fp8.enabled)
    padded = -(-longest // alignment) * alignment
    if padded > config.training.micro_batch_tokens:
        reason = "FP8 and the layout" if config.model.fp8.enabled else "sequence and context parallelism"
        padding = f", padded to {padded} for {reason}" if padded != longest else ""
        yield (
            f"training.micro_batch_tokens: {config.training.micro_batch_tokens} cannot hold the longest sequence: "
            f"{asked}{padding}"
        )


def batch_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Fewer sequences in a step than data-parallel ranks to share them."""
    replicas = data_parallel_size(config.parallel, world_size)
    if config.algorithm.name == "sft":
        asked, sequences = "training.sft_batch_size", config.training.sft_batch_size
    else:
        asked = "rollout.prompts_per_step x group_size"
        sequences = config.rollout.prompts_per_step * config.rollout.group_size
    if sequences < replicas:
        yield f"{asked} = {sequences}: fewer sequences in a step than the {replicas} data-parallel ranks that share them"


def reward_problems(config: RunConfig) -> Iterator[str]:
    """Reward functions that do not import, and terms whose metrics would overwrite each other."""
    if config.algorithm.name == "sft":
        return
    names = [term.name or term.kind for term in config.rewards.terms]
    if not names:
        yield "rewards.terms: the list is empty, so every reward would be 0; give at least one term"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"rewards.terms: two terms are called {name}; give each its own rewards.terms[].name"
    for index, term in enumerate(config.rewards.terms):
        yield from _term_problem(f"rewards.terms[{index}]", term)


def checkpoint_problems(directory: Path) -> Iterator[str]:
    """Missing or damaged weight files of a local checkpoint; nothing for a hub name."""
    if not directory.is_dir():
        return
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            older = (
                ", but a pytorch_model.bin: convert it with save_pretrained"
                if any(directory.glob("*.bin"))
                else ""
            )
            yield f"model.path: {directory}: no safetensors weights there{older}"
        else:
            yield from _shard_problems(directory / "model.safetensors", None)
        return
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        yield f"model.path: {index}: not a safetensors index ({error}); fetch the checkpoint again"
        return
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        yield (
            f"model.path: {directory}: {len(missing)} of {len(shards)} weight files named in {index.name} are missing: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; fetch the checkpoint again"
        )
    for name in sorted(set(shards) - set(missing)):
        yield from _shard_problems(directory / name, {k for k, shard in weight_map.items() if shard == name})


def _shard_problems(file: Path, expected: set[str] | None) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(
            file, framework="np"
        ) as tensors:  # reads the header, and compares it with the file's size
            lacking = (expected or set()) - set(tensors.keys())
    except (SafetensorError, OSError) as error:
        yield f"model.path: {file}: damaged or cut short ({error}); fetch the checkpoint again"
        return
    if lacking:
        yield f"model.path: {file}: lacks {len(lacking)} tensors that the index places there, e.g. {min(lacking)}"


def _unsupported_variant(config: Any) -> str | None:
    """A key of config.json that changes the computation in a way that the Megatron model would silently not follow."""
    architecture = config.architectures[0]
    variants = {
        "attention_bias: true": getattr(config, "attention_bias", False)
        and architecture != "Qwen2ForCausalLM",
        "mlp_bias: true": getattr(config, "mlp_bias", False),
        "use_sliding_window: true": getattr(config, "use_sliding_window", False),
        "mlp_only_layers": bool(getattr(config, "mlp_only_layers", None)),
        "decoder_sparse_step other than 1": getattr(config, "decoder_sparse_step", 1) != 1,
        f"hidden_act: {config.hidden_act}": config.hidden_act != "silu",
    }
    return next((name for name, present in variants.items() if present), None)


def _check_tokenizer(config: RunConfig, shape: HFShape) -> None:
    from transformers import AutoTokenizer

    from gtpo_megatron.data.prompts import check_tokenizer

    path = config.model.tokenizer or config.model.path
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception on a damaged tokenizer.json
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: {path}: the tokenizer does not load: {reason}") from error
    check_tokenizer(tokenizer, config.data.chat)
    if len(tokenizer) > shape.vocab:
        raise UserError(
            f"{key}: {path}: the tokenizer has {len(tokenizer)} tokens, the model only {shape.vocab}; they do not belong together"
        )


def _raised(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def _term_problem(key: str, term: RewardTerm) -> Iterator[str]:
    """A function that does not import, or options that the term does not take."""
    path = term.function
    try:
        function = term_function(term.kind) if path is None else import_function(path)
    except Exception as error:  # a user's module may raise anything
        yield f"{key}.function: {path}: {_import_reason(path, error)}"
        return
    try:
        check_options(term.kind, function, term.options)
    except (TypeError, ValueError) as error:
        yield f"{key}.options: {path or term.kind}: {error}"


def _import_reason(path: str, error: Exception) -> str:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        return "expected package.module:function"
    if isinstance(error, AttributeError) and module in sys.modules:
        return f"{module} has no {name}"
    if isinstance(error, TypeError) and module in sys.modules:
        return f"{name} is not callable"
    return f"{module} does not import: {type(error).__name__}: {error}"


def _indivisible(key: str, value: int, what: str, size: int, least: int = 1) -> str:
    divisors = [d for d in range(least, min(size, 64) + 1) if size % d == 0]
    return f"{key}: {value} does not divide the {what}; possible: {', '.join(map(str, divisors)) or 'none'}"
