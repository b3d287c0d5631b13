"""A checkpoint's config.json by directory or hub name, and why it is not to be had: missing, gated, or the hub out of reach."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gtpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(path: str) -> "PretrainedConfig":
    """The configuration of a Hugging Face checkpoint. Raises UserError if there is none, saying what to do."""
    from transformers import AutoConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path: {path}: no config.json there; give a Hugging Face checkpoint directory")
    if not Path(path).is_dir() and _looks_local(path):
        raise UserError(
            f"model.path: {path}: no such folder; give a Hugging Face checkpoint directory or a hub name. A model that another "
            "run or command makes has to be made first: the recipe's header says which"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path}: {_reason(path, error)}") from error


def _looks_local(path: str) -> bool:
    """What can be no name of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return True
    return path.startswith(("/", "./", "../", "~"))


def _reason(path: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    said = " ".join(str(error).split())[:300]
    if Path(path).is_dir():
        return f"its config.json does not load: {said}"
    causes = list(_chain(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            "a gated model of the hub: ask for access on its page there, then set HF_TOKEN to a token of that account on "
            "every node, or give a folder that holds the checkpoint"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            "no such folder here, and no such model on the hub for this account (a private one needs HF_TOKEN); give a "
            "Hugging Face checkpoint directory or a hub name"
        )
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return (
            "no such folder here, not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set); give a "
            "folder that holds the checkpoint"
        )
    return f"neither a checkpoint directory nor a hub name that loads: {said}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
