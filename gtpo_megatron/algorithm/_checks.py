"""Checks of arguments that the public functions share. Each raises ValueError naming the argument and the offending index."""

import torch
from torch import Tensor


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise unless `value` has `shape`; `meaning` says it in letters, such as "[N, L]"."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, not {list(value.shape)}")


def check_integers(name: str, value: Tensor) -> None:
    """Raise unless `value` holds integers."""
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} must hold integers, not {value.dtype}")


def check_floats(name: str, value: Tensor) -> None:
    """Raise unless `value` holds floating-point numbers."""
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, not {value.dtype}")


def check_all(name: str, value: Tensor, good: Tensor, rule: str) -> None:
    """Raise for the first index where `good` is false. Costs one device-to-host copy of a flag."""
    if not bool(good.all()):
        index = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name}[{index}] is {value[index].item()}: {rule}")


def check_lengths(lengths: Tensor, count: int, max_length: int) -> None:
    """Raise unless `lengths` holds `count` integers from 1 to `max_length`."""
    check_shape("lengths", lengths, (count,), "[N]")
    check_integers("lengths", lengths)
    rule = f"a length must be from 1 to L = {max_length}"
    check_all("lengths", lengths, (lengths >= 1) & (lengths <= max_length), rule)
