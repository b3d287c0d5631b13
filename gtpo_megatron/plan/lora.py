"""LoRA before a model is built: adapters that the model, the layout or Megatron-Bridge cannot have, and what they need."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gtpo_megatron.config import LoraConfig, ParallelConfig, RunConfig
from gtpo_megatron.plan.layout import HFShape, stage_layers

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one fused matrix of Megatron's each
# What PEFT can do and the bridge's adapters cannot, with the value that means without it.
WITHOUT = {
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "exclude_modules": None,
}


def target_sizes(shape: HFShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each layer of a dense model that can have an adapter, by PEFT's name."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, shape.ffn),
        "up_proj": (hidden, shape.ffn),
        "down_proj": (shape.ffn, hidden),
    }


def adapter_parameters(shape: HFShape, lora: LoraConfig, parallel: ParallelConfig, pipeline_rank: int) -> int:
    """Adapter parameters on any one rank of a pipeline stage: both matrices are split over tensor ranks."""
    sizes = target_sizes(shape)
    layers = len(stage_layers(shape.layers, parallel, pipeline_rank))
    return layers * sum(sum(sizes[target]) for target in lora.targets) * lora.rank // parallel.tensor


def lora_problems(config: RunConfig, shape: HFShape) -> Iterator[str]:
    """Rules of `model.lora`; none without it."""
    lora, tensor = config.model.lora, config.parallel.tensor
    if lora is None:
        return
    if shape.experts:
        yield (
            f"model.lora: {shape.architecture} is a mixture of experts; adapters are supported on dense models alone "
            "(Megatron-Bridge shares an expert layer's adapter among experts, which PEFT's format cannot say)"
        )
        return
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield f"model.lora.targets: {', '.join(lora.targets) or 'none'}: name at least one layer, and each once"
    for names in TOGETHER:
        present = [name for name in names if name in lora.targets]
        if present and len(present) < len(names):
            yield (
                f"model.lora.targets: {', '.join(present)} without {', '.join(n for n in names if n not in present)}: "
                "Megatron-Bridge's adapters on this fused matrix come together; name all of them or none"
            )
    for target in dict.fromkeys(lora.targets):
        width = min(target_sizes(shape)[target])
        if lora.rank > width:
            yield f"model.lora.rank: {lora.rank} is above the width of {target}, {width}: it would not be of low rank"
    if lora.rank % tensor:
        yield f"model.lora.rank: {lora.rank} is not a multiple of parallel.tensor: {tensor}, over which it is split"
    if lora.dropout and tensor > 1:
        yield (
            f"model.lora.dropout: {lora.dropout} needs parallel.tensor: 1, not {tensor}: Megatron-Bridge draws the zeroed "
            "inputs on each tensor rank for itself, and their gradients would not belong together"
        )
    if lora.path is not None:
        yield from _stored_problems(Path(lora.path), lora, config.model.path, shape)


def _stored_problems(directory: Path, lora: LoraConfig, base: str, shape: HFShape) -> Iterator[str]:
    """An adapter on disk that is not the configured one, or is of another base."""
    file = directory / "adapter_config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        targets = set(stored["target_modules"])
        rank, alpha, kind, trained_on = (
            stored[key] for key in ("r", "lora_alpha", "peft_type", "base_model_name_or_path")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"model.lora.path: {file}: not an adapter in PEFT's format ({type(error).__name__}: {error})"
        return
    if kind != "LORA":
        yield f"model.lora.path: {file}: peft_type is {kind}, not LORA"
    for key, said, wanted in (
        ("rank", rank, lora.rank),
        ("alpha", alpha, lora.alpha),
        ("targets", sorted(targets), sorted(lora.targets)),
    ):
        if said != wanted:
            yield f"model.lora.{key}: {wanted}, but the adapter in {directory} has {said}"
    for key, value in WITHOUT.items():
        if stored.get(key, value) not in (value, None):
            yield f"model.lora.path: {file}: {key} is {stored[key]}; adapters here are without it"
    if trained_on is not None and Path(trained_on).name.casefold() != Path(base).name.casefold():
        yield (
            f"model.lora.path: {directory}: the adapter is of another base, {trained_on}, not {base} (if the two are the "
            f"same weights, say so in {file})"
        )
    yield from _shape_problems(directory / "adapter_model.safetensors", lora, shape)


def _shape_problems(file: Path, lora: LoraConfig, shape: HFShape) -> Iterator[str]:
    """Tensors that are not those of these adapters on this base, by the file's header."""
    from safetensors import SafetensorError, safe_open

    wanted: dict[str, list[int]] = {}
    sizes: dict[str, Any] = target_sizes(shape)
    for layer in range(shape.layers):
        for target in lora.targets:
            part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            inputs, outputs = sizes[target]
            wanted |= {
                f"{name}.lora_A.weight": [lora.rank, inputs],
                f"{name}.lora_B.weight": [outputs, lora.rank],
            }
    try:
        with safe_open(file, framework="np") as tensors:
            found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        yield f"model.lora.path: {file}: missing, damaged or cut short ({error})"
        return
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        yield (
            f"model.lora.path: {file}: {len(wrong)} tensors are not those of this base and rank, e.g. {name}: "
            f"{found.get(name, 'missing')} there, {wanted.get(name, 'none')} here"
        )
