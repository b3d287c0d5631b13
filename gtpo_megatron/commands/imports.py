"""How commands import what is large."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For imports of torch, transformers and Megatron-Core: Python looks for no garbage while they load.

    Thousands of modules that all stay were searched again and again, a fifth of the time that a rank needs to start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
