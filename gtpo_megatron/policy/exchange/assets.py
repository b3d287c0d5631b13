"""The small files of a Hugging Face checkpoint: configuration, generation settings, tokenizer, names of the weights."""

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.model import Policy

CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
INDEX = "model.safetensors.index.json"


def resolve(source: str | Path, patterns: tuple[str, ...]) -> Path:
    """The local directory of a Hugging Face checkpoint; a hub name is looked up (and its small files fetched)."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"{source}: neither a directory nor a reachable hub name: {error}") from error


def copy_assets(
    source: str | Path, tokenizer: str | Path, directory: Path, weights: dict[str, str] | None = None
) -> None:
    """Copy configuration and tokenizer files into `directory`; with `weights` (name -> file) also write an index.

    With the index and without the weights the directory is what megatron.bridge needs to export a policy.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = resolve(source, CONFIGURATION)
    if not (folder / CONFIGURATION[0]).is_file():
        raise UserError(f"{folder / CONFIGURATION[0]}: missing; {source} is not a Hugging Face checkpoint")
    _copy(folder, CONFIGURATION, directory)
    _copy(resolve(tokenizer, TOKENIZER), TOKENIZER, directory)
    if weights is not None:
        (directory / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": weights}, indent=1), encoding="utf-8"
        )


def weight_map(policy: Policy) -> dict[str, str]:
    """Hugging Face name of every weight of the policy's source, and the file that holds it."""
    return dict(policy.bridge.hf_pretrained.state.source.key_to_filename_map)


def _copy(source: Path, names: tuple[str, ...], directory: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
