"""Doing a thing on some ranks so that all ranks agree on how it ended."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.model import world_rank

T = TypeVar("T")


def together(action: Callable[[], T]) -> list[T]:
    """Run on every rank; the results of all ranks in order. If any rank fails, all raise what the first of them raised.

    Turns OSError and SafetensorError into UserError; other exceptions are faults of the program and pass.
    """
    outcome: tuple[bool, Any]
    try:
        outcome = (True, action())
    except UserError as error:
        outcome = (False, error)
    except OSError as error:
        outcome = (False, UserError(f"{error.filename or 'file'}: {error.strerror or error}"))
    except SafetensorError as error:
        outcome = (False, UserError(f"safetensors: {error}"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, outcome)
    for good, value in gathered:
        if not good:
            raise value
    return [value for _, value in gathered]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run on rank 0 alone; its result, or its error, on every rank."""
    return together(lambda: action() if world_rank() == 0 else None)[0]
