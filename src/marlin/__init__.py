"""INT4 linear layers with 2:4 sparsity: compress a model, save it, load it, run it through fast CUDA kernels.

Importing this registers `torch.ops.marlin.*` and the quantizer of transformers, each as soon as torch or transformers
is imported: before or after this, never by it. Nothing compiles, starts a GPU or touches the disk; every public name is
imported on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from marlin.integrations.transformers import register_lazily

__version__ = "0.1.0"

_HOMES = {
    "marlin.api": ("save_pretrained",),
    "marlin.compat": ("Layer", "Layer_2_4", "mul", "mul_2_4", "replace_linear"),
    "marlin.compress": ("LayerRecipe", "Options", "Recipe"),
    "marlin.errors": ("CheckpointError", "CompileError", "LaunchError", "MarlinError", "UnsupportedError"),
    "marlin.formats": ("CompressedWeight", "DenseInt4Weight"),
    "marlin.formats.layouts": ("PackedWeight", "pack", "unpack"),
    "marlin.nn": ("SparseLinear", "replace_linears", "sparse_linears"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("api", "compat", "compress", "errors", "evaluate", "formats", "nn", "ops", "runtime", "settings")

__all__ = ["__version__", "compress", "ops", *sorted(_HOME_OF)]


class _CallablePackage(ModuleType):
    """`marlin.compress` is a package of that name and, called, the function `marlin.api.compress`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("marlin.api").compress(*args, **kwargs)


class _Marlin(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Why here: the import system sets the attribute whichever way the package is imported first.
        if name == "compress" and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Marlin


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"marlin.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'marlin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


register_lazily()
