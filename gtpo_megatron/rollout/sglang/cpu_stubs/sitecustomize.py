"""Stand-ins for triton and torchvision where they are not installed; on a server's path only when it runs without CUDA.

SGLang defines Triton kernels and image transforms at import time. On a CPU none of them is ever called, so names
that exist are all that the import needs.
"""

import enum
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

PACKAGES = ("triton", "torchvision")


class _Names(types.ModuleType):
    """A module in which every public name exists: classes where capitalised, else callables usable as decorators."""

    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            value: Any = enum.Enum(
                name, ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
            )
        elif name[0].isupper():
            value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        else:
            value = sys.modules.get(f"{self.__name__}.{name}") or _Names(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        return _undecorated


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class _Finder(MetaPathFinder, Loader):
    """Stands last on the path of finders: an installed package wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _Names(spec.name)
        if spec.name == "triton":
            module.cdiv = lambda a, b: -(a // -b)
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())
