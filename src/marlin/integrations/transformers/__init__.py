"""Lets `transformers` load and save compressed models, once `marlin` is imported, without importing it.

Owns: the moment of registration. Importing this package costs nothing; the quantizer itself (`.quantizer`) is imported
when `transformers.quantizers.auto` is, before or after us. Knows nothing of formats or modules.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds only `_TARGET`, by way of the other finders, and registers the quantizer once it has been executed."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == _TARGET:
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # Why: transformers must stay importable for everything else, whatever its version.
    try:
        from marlin.integrations.transformers.quantizer import register

        register()
    except Exception as error:
        warnings.warn(
            f"marlin: the quantizer could not be registered with transformers ({type(error).__name__}: {error}); "
            "compressed models will not load. Install a tested version of transformers.",
            RuntimeWarning,
            stacklevel=2,
        )


def register_lazily() -> None:
    """Register the quantizer `sparse_marlin` with transformers: now if it is imported, else as soon as it is.

    Repeated calls change nothing. Without transformers installed, nothing happens.
    """
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
