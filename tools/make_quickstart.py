"""Make what the quickstart trains on: a small random Llama with its tokenizer, and addition problems with solutions."""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "system", "user", "assistant"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII, and one for each tag and role."""
    tokens = [*SPECIAL, *WORDS, "\n", *(chr(c) for c in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    words = "|".join([*WORDS, "[\\s\\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int, seed: int, *, hidden: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """A Llama of random weights; about 0.8 million of them by default."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def problem(rng: random.Random, slips: float = 0.0) -> dict[str, str]:
    """A sum of two digits; with probability `slips` its solution is off by one or two, and so is its answer."""
    a, b = rng.randrange(10), rng.randrange(10)
    total = a + b + (rng.choice((-2, -1, 1, 2)) if rng.random() < slips else 0)
    return {"question": f"{a}+{b}?", "solution": f"{a}+{b}={total}", "answer": str(total)}


def main() -> None:
    """Write <directory>/model and <directory>/data: warmup.jsonl has slips, train.jsonl and test.jsonl have none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), arguments.seed).save_pretrained(arguments.directory / "model")
    tokenizer.save_pretrained(arguments.directory / "model")
    rng = random.Random(arguments.seed)
    data = arguments.directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    # A policy that has learned from a teacher who slips half of the time is right half of the time: what GTPO can mend.
    for split, rows, slips in (("warmup", 6000, 0.5), ("train", 4000, 0.0), ("test", 100, 0.0)):
        lines = [json.dumps(problem(rng, slips)) for _ in range(rows)]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
