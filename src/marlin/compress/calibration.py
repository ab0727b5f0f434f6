"""Which windows of a text calibrate a model. Owns the seeded choice; knows nothing of models or tokenizers."""

from __future__ import annotations

import torch

from marlin.errors import message, require


def calibration_windows(token_ids: torch.Tensor, samples: int = 16, length: int = 1024, seed: int = 0) -> torch.Tensor:
    """Seeded choice of windows without overlap from a token stream: int64 [any] to [samples, length].

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
    return stream[: count * length].view(count, length)[order]
