"""Doing a thing on some ranks so that all ranks agree on how it ended."""

from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

from gtpo_megatron import control
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.model import world_rank

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """Run on every rank; this rank's own result. If any rank fails, all raise what the first of them raised.

    Turns OSError and SafetensorError into UserError; other exceptions are faults of the program: they pass on their own
    rank, and are a RankError on the others.
    """
    result, error = None, None
    try:
        result = action()
    except OSError as caught:
        error = UserError(f"{caught.filename or 'file'}: {caught.strerror or caught}")
    except SafetensorError as caught:
        error = UserError(f"safetensors: {caught}")
    except Exception as caught:
        error = caught
    control.raise_together(error)
    return result


def for_rank_zero(action: Callable[[], T]) -> T | None:
    """Run on rank 0 alone, where its result stays (None elsewhere); its error is raised on every rank."""
    return together(lambda: action() if world_rank() == 0 else None)


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run on rank 0 alone; its result, or its error, on every rank. For what is small: all get it."""
    return control.broadcast_from_zero(for_rank_zero(action))
