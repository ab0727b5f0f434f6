"""Error types of the package, and `require`, the one way in which bad input is refused.

Owns the form of every message: `<op>: <requirement>; got <values>. <what to do>`. Knows nothing else of the package.
"""

from __future__ import annotations


class MarlinError(Exception):
    """Base of the errors that are not plain ValueError or TypeError."""


class UnsupportedError(MarlinError, RuntimeError):
    """This GPU, driver, compiler or feature cannot do what was asked; the message says what can."""


class CompileError(MarlinError, RuntimeError):
    """A kernel did not compile; the message carries kernel, arguments, architecture and the whole compiler log."""


class LaunchError(MarlinError, RuntimeError):
    """The CUDA driver refused to load or launch a kernel."""


class CheckpointError(MarlinError, ValueError):
    """A checkpoint on disk is truncated, tampered with, or of a kind that cannot be read."""


def message(op: str, requirement: str, got: str, fix: str = "") -> str:
    """The project's error form, in one place."""
    text = f"{op}: {requirement}; got {got}."
    return f"{text} {fix}" if fix else text


def require(
    condition: bool, op: str, requirement: str, got: str, fix: str = "", error: type[Exception] = ValueError
) -> None:
    """Raise `error` with the project's message form unless `condition` holds.

    For checks whose `got` text is costly to build, test the condition first and call `message` yourself.
    """
    if not condition:
        raise error(message(op, requirement, got, fix))
