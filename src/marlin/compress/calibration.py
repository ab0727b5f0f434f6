"""Which windows of a text calibrate a model, and how they begin. Owns the seeded choice; knows nothing of models."""

from __future__ import annotations

import torch

from marlin.errors import message, require


def begun(rows: torch.Tensor, begin: int | None) -> torch.Tensor:
    """Windows [W, T] with the token `begin` in the place of the first of each; as they are for None.

    Why: models whose texts all begin with a special token attend to it from everywhere, and predict badly without it.
    """
    if begin is None:
        return rows
    return torch.cat([torch.full_like(rows[:, :1], begin), rows[:, 1:]], dim=1)


def calibration_windows(
    token_ids: torch.Tensor, samples: int = 16, length: int = 1024, seed: int = 0, begin: int | None = None
) -> torch.Tensor:
    """Seeded choice of windows without overlap from a token stream: int64 [any] to [samples, length].

    begin: the token that all texts of the model begin with, if any (`marlin.api.beginning` of the tokenizer); it takes
    the place of the first token of each window.

    Raises: TypeError (dtype), ValueError (the text has fewer whole windows than asked for).
    """
    op = "calibration_windows"
    if token_ids.dtype != torch.int64:
        raise TypeError(message(op, "token_ids must be int64", str(token_ids.dtype), "Pass tokenizer ids."))
    require(samples >= 1 and length >= 1, op, "samples and length must be at least 1", f"{samples} and {length}")
    stream = token_ids.flatten()
    count = stream.numel() // length
    require(
        count >= samples,
        op,
        f"the text must hold {samples} windows of {length} tokens",
        f"{stream.numel()} tokens",
        "Use more text, or fewer or shorter samples.",
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return begun(stream[: count * length].view(count, length)[order], begin)
