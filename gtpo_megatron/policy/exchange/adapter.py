"""Writing a policy's LoRA adapters in Hugging Face's PEFT format: adapter_config.json and adapter_model.safetensors."""

import json
import shutil
import uuid
from pathlib import Path

from safetensors.torch import save_file

from gtpo_megatron.config import LoraConfig, ModelConfig
from gtpo_megatron.policy.adapters import WEIGHTS, adapter_weights
from gtpo_megatron.policy.checkpoint.files import check_free_space
from gtpo_megatron.policy.collective import on_rank_zero
from gtpo_megatron.policy.exchange.export import replace_directory
from gtpo_megatron.policy.model import DTYPES, Policy, world_rank

CONFIG = "adapter_config.json"


def export_adapter(policy: Policy, model: ModelConfig, directory: Path) -> None:
    """Write the adapters as a directory that peft loads over `model.path`. Collective.

    It appears whole or not at all; one of that name is replaced. Raises UserError on every rank when writing fails.
    """
    weights = {}
    for name, tensor in adapter_weights(policy.bridge, policy.modules):
        if world_rank() == 0:
            weights[name] = tensor.to(DTYPES[model.dtype], copy=True).contiguous()

    def write() -> None:
        partial = directory.with_name(f".{directory.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            partial.mkdir(parents=True)
            check_free_space(partial, sum(tensor.nbytes for tensor in weights.values()))
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(_config(model.lora, model.path), indent=2)
            (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
            replace_directory(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    on_rank_zero(write)


def _config(lora: LoraConfig, base: str) -> dict[str, object]:
    """What peft.LoraConfig reads; what is not named has its default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
