"""Tiny seeded Hugging Face checkpoints, each with a tokenizer made on the spot: what the tests train and convert."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

Family = Literal["llama", "llama3", "qwen2", "qwen2_tied", "qwen3", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = get_args(Family)

PAD_ID, IM_START_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is 12 + 34? <reasoning>12 + 34 = 46</reasoning> <answer>46</answer>",
    "Add 7 and 8. <reasoning>7 + 8 = 15</reasoning> <answer>15</answer>",
    "system user assistant the answer is the sum of the two numbers",
]

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SPECIFIC: dict[Family, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),  # wider heads than hidden_size / heads: a trap for layouts
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}


def tiny_config(family: Family, **overrides: Any) -> PretrainedConfig:
    """The configuration of a 4-layer model of the family; overrides are Hugging Face config keys."""
    model_type, specific = SPECIFIC[family]
    return AutoConfig.for_model(model_type, **(COMMON | specific | overrides))


def tiny_tokenizer(vocab_size: int = COMMON["vocab_size"]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens with chat template, eos and pad.

    Below 259 tokens there is no room for all bytes: the alphabet is then printable ASCII and newline.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    ascii_alphabet = [chr(c) for c in range(33, 127)] + [
        "Ġ",
        "Ċ",
    ]  # byte-level spellings of space and newline
    alphabet = pre_tokenizers.ByteLevel.alphabet() if vocab_size >= 259 else ascii_alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_checkpoint(
    directory: Path, family: Family, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Write a seeded fp32 checkpoint and its tokenizer into `directory`, and return it.

    Norm weights are N(1, 0.2) and biases N(0, 0.2), so that a converter which drops or swaps one is seen.
    A small `max_shard_size` such as "100KB" gives several shards and an index.
    """
    config = tiny_config(family, **overrides)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    torch.set_rng_state(generator_state)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer(config.vocab_size).save_pretrained(directory)
    return Path(directory)
