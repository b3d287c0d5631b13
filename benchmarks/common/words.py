"""A tokenizer for models that are made up: its words are t0, t1, and so on."""

from pathlib import Path


def save_tokenizer(directory: Path, vocabulary: int, eos: str | None = None) -> None:
    """Put it beside a model; t0 pads, and stands for what is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token=eos)
    fast.save_pretrained(directory)
