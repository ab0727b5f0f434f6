"""Switches of the whole process that the environment sets and Python may change: batch-invariant mode.

Reads an environment variable on the first question, once. Knows nothing of what follows from a switch.
"""

from __future__ import annotations

import os

from marlin.errors import require

_BATCH_INVARIANT = "MARLIN_BATCH_INVARIANT"
_batch_invariant: bool | None = None


def batch_invariant() -> bool:
    """Whether the bits of an output row must depend on neither the number of rows nor the other rows.

    MARLIN_BATCH_INVARIANT (0 or 1, default 0), or what `set_batch_invariant` said last. Raises: ValueError (the
    variable is neither).
    """
    return _from_environment() if _batch_invariant is None else _batch_invariant


def set_batch_invariant(on: bool) -> None:
    """Switch the mode for all later calls of this process. CUDA graphs keep the mode that they were captured in."""
    global _batch_invariant
    _batch_invariant = bool(on)


def _from_environment() -> bool:
    text = os.environ.get(_BATCH_INVARIANT, "0")
    require(text in ("0", "1"), _BATCH_INVARIANT, "it must be 0 or 1", repr(text))
    set_batch_invariant(text == "1")
    return text == "1"
