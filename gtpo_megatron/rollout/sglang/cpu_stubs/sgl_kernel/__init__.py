"""Stand-in for sgl_kernel where it is not installed: SGLang imports names from it, then uses its plain torch branches.

A kernel that is really called raises NotImplementedError with its name.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a CPU")

    missing.__name__ = name
    return missing
