"""What a dry run does without: a layout can be planned from config.json alone, long before weights are fetched."""

from pathlib import Path
from typing import Literal

from gtpo_megatron.config import DataConfig, RunConfig
from gtpo_megatron.data.rows import resolve_source
from gtpo_megatron.data.suites import DATA, suites_in_training
from gtpo_megatron.errors import UserError

Part = Literal["weights", "tokenizer", "data", "evaluation.data", "evaluation.suites"]

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")


def absent_parts(config: RunConfig) -> dict[Part, str]:
    """The parts of a run that are not here to be checked, each with a sentence that says so.

    A part counts as absent only if none of its files is there, or if it has a hub name and the hub cannot be reached:
    what is there and damaged stays a problem for `check_run` to name. Nothing is said of a path that is wrong.
    """
    tokenizer = config.model.tokenizer or config.model.path
    tokenizer_key = "model.tokenizer" if config.model.tokenizer else "model.path"
    found: dict[Part, str | None] = {
        "weights": _weights_absent(config.model.path),
        "tokenizer": _tokenizer_absent(tokenizer, tokenizer_key),
        "data": _data_absent(config.data, "data.path"),
        "evaluation.data": config.evaluation.data
        and _data_absent(config.evaluation.data, "evaluation.data.path"),
        "evaluation.suites": _suites_absent(config),
    }
    return {part: sentence for part, sentence in found.items() if sentence}


def _weights_absent(path: str) -> str | None:
    if not Path(path).is_dir():
        return f"model.path: {path}: a hub name; its weights were not looked for"
    if _any_file(Path(path), _WEIGHTS):
        return None
    return f"model.path: {path}: no weights there, so none were checked"


def _tokenizer_absent(path: str, key: str) -> str | None:
    if Path(path).is_dir():
        present = _any_file(Path(path), _TOKENIZER)
        where = "no tokenizer there"
    else:
        present = _on_hub_or_cached(path)
        where = "the hub cannot be reached, and no tokenizer is cached"
    unchecked = "chat template, special tokens and vocabulary were not checked"
    return None if present else f"{key}: {path}: {where}; {unchecked}"


def _data_absent(data: DataConfig, key: str) -> str | None:
    try:
        local = resolve_source(data)
    except UserError:
        return None  # `check_run` names it
    return None if local else f"{key}: {data.path}: a hub name; its rows were not looked for"


def _suites_absent(config: RunConfig) -> str | None:
    try:
        suites = suites_in_training(config, look=False)
    except UserError:
        return None  # `check_run` names it
    absent = [_data_absent(suite.data, f"{suite.title}: path") for suite in suites if suite.name != DATA]
    return "; ".join(sentence for sentence in absent if sentence) or None


def _any_file(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in patterns)


def _on_hub_or_cached(name: str) -> bool:
    """False only if nothing can be known of the name: not cached, and no answer from the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "tokenizer_config.json")
    except LocalEntryNotFoundError:
        return False
    except (HFValidationError, HfHubHTTPError, OSError):
        return True  # no such name, gated, or without this file: loading the tokenizer says which
    return True
