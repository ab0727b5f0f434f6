"""Lets `transformers` load and save compressed models, and `peft` train adapters on them, without importing either.

Owns: the moment of registration. Importing this package costs nothing; the operators are registered when `torch` is
imported, the quantizer (`.quantizer`) when `transformers.quantizers.auto` is, and `marlin.integrations.peft` when
`peft.tuners.lora.model` is, before or after us. Knows nothing of formats.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType


def _register_operators() -> None:
    import marlin.nn  # noqa: F401  (what it imports registers them)


def _register_quantizer() -> None:
    from marlin.integrations.transformers.quantizer import register

    register()


def _register_lora() -> None:
    from marlin.integrations.peft import register

    register()


# What is done once a module has been executed, what that registers, and what is lost where it fails.
_ACTIONS: dict[str, tuple[Callable[[], None], str, str]] = {
    "torch": (_register_operators, "the operators", "torch.ops.marlin has none"),
    "transformers.quantizers.auto": (_register_quantizer, "the quantizer", "compressed models will not load"),
    "peft.tuners.lora.model": (_register_lora, "the LoRA layer", "compressed layers will take no adapters"),
}


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds modules of `_ACTIONS`, by way of the other finders, and acts once they have been executed.

    It also watches modules of this package: what is due while one of them is half-executed waits until it is whole.
    """

    def __init__(self) -> None:
        self._searching: set[str] = set()
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        watched = fullname in _ACTIONS or fullname.startswith("marlin.")
        if not watched or fullname in self._searching:
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
            with self._executing(ours=fullname not in _ACTIONS):
                execute(module)
                if fullname in _ACTIONS and module.__name__ == fullname:
                    self._thread.due.append(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    @contextlib.contextmanager
    def _executing(self, ours: bool) -> Iterator[None]:
        state = self._thread.__dict__
        state.setdefault("depth", 0)
        due = state.setdefault("due", [])
        state["depth"] += ours
        try:
            yield
        finally:
            state["depth"] -= ours
            while due and not state["depth"]:
                _act(due.pop(0))


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
    """Register the operators with torch, the quantizer with transformers, the LoRA layer with peft, once each is there.

    That is now, or later. Repeated calls change nothing. Where one is not installed, nothing happens.
    """
    for target in _ACTIONS:
        if target in sys.modules:
            _act(target)
    waiting = any(target not in sys.modules for target in _ACTIONS)
    if waiting and not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
