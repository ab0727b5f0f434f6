"""Lets `transformers` load and save compressed models, and `peft` train adapters on them, without importing either.

Owns: the moment of registration. Importing this package costs nothing; the quantizer (`.quantizer`) is imported when
`transformers.quantizers.auto` is, and `marlin.integrations.peft` when `peft.tuners.lora.model` is, before or after us.
Knows nothing of formats or modules.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_quantizer() -> None:
    from marlin.integrations.transformers.quantizer import register

    register()


def _register_lora() -> None:
    from marlin.integrations.peft import register

    register()


# What is done once a module has been executed, what that registers, and what is lost where it fails.
_ACTIONS: dict[str, tuple[Callable[[], None], str, str]] = {
    "transformers.quantizers.auto": (_register_quantizer, "the quantizer", "compressed models will not load"),
    "peft.tuners.lora.model": (_register_lora, "the LoRA layer", "compressed layers will take no adapters"),
}


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds only modules of `_ACTIONS`, by way of the other finders, and acts once they have been executed."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ACTIONS or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.remove(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == fullname:
                _act(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _act(target: str) -> None:
    # Why: the other package must stay importable for everything else, whatever its version.
    action, what, loss = _ACTIONS[target]
    package = target.partition(".")[0]
    try:
        action()
    except Exception as error:
        warnings.warn(
            f"marlin: {what} could not be registered with {package} ({type(error).__name__}: {error}); "
            f"{loss}. Install a tested version of {package}.",
            RuntimeWarning,
            stacklevel=2,
        )


def register_lazily() -> None:
    """Register the quantizer `sparse_marlin` with transformers and the LoRA layer with peft, once each is imported.

    That is now, or later. Repeated calls change nothing. Where one is not installed, nothing happens.
    """
    for target in _ACTIONS:
        if target in sys.modules:
            _act(target)
    waiting = any(target not in sys.modules for target in _ACTIONS)
    if waiting and not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
