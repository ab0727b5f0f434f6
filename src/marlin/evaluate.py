"""Perplexity of a causal language model, by one fixed protocol.

Owns the protocol below. Knows nothing of compression or kernels: any model whose output has `.logits` can be measured.

Protocol: the token stream is cut into windows of `window` tokens without overlap and without added special tokens;
the first `limit` whole windows count. Within a window tokens 1..window-1 are predicted from those before
them; the first token is only context. Perplexity is exp of the mean negative log-likelihood over all predicted tokens,
summed in float64 from float32 log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from marlin.errors import message, require


def windows(token_ids: torch.Tensor, window: int, limit: int | None) -> torch.Tensor:
    """The first `limit` whole windows of a token stream: int64 [any] to [W, window].

    Raises: TypeError (dtype is not int64), ValueError (not one whole window, or a bad window length).
    """
    op = "evaluate.windows"
    if token_ids.dtype != torch.int64:
        raise TypeError(message(op, "token_ids must be int64", str(token_ids.dtype), "Pass tokenizer ids."))
    require(window >= 2, op, "window must be at least 2", f"window={window}")
    require(limit is None or limit >= 1, op, "limit must be at least 1, or None for all", f"limit={limit}")
    stream = token_ids.flatten()
    count = stream.numel() // window
    require(
        count >= 1,
        op,
        f"the text must hold at least one window of {window} tokens",
        f"{stream.numel()} tokens",
        "Use a longer text or a shorter window.",
    )
    count = count if limit is None else min(count, limit)
    return stream[: count * window].view(count, window)


def log_likelihoods(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each predicted token of ids [B, T], on the model's device: float32 [B, T-1]."""
    ids = ids.to(model_device(model))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        ids.shape[0], -1
    )


def model_device(model: Any) -> torch.device:
    """Where the model takes its tokens: the device of its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return torch.device(tensor.device)
    return torch.device("cpu")


def perplexity(
    model: Any,
    token_ids: torch.Tensor,
    *,
    window: int = 1024,
    limit: int | None = 40,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of model on a token stream, by the protocol of this module.

    token_ids: int64, flattened. The model computes in its own dtype; the figures of this project are taken in float32.
    progress(done, total) is called after each window.
    Raises: ValueError (text shorter than a window, or the model gives NaN or infinity), TypeError (dtype).
    """
    rows = windows(token_ids, window, limit)
    total, count = 0.0, 0
    was_training = bool(getattr(model, "training", False))
    model.eval()
    try:
        with torch.inference_mode():
            for index, row in enumerate(rows):
                values = log_likelihoods(model, row.unsqueeze(0))
                total -= float(values.double().sum())
                count += values.numel()
                if progress is not None:
                    progress(index + 1, len(rows))
    finally:
        model.train(was_training)
    require(
        math.isfinite(total),
        "perplexity",
        "the model must give finite log-likelihoods",
        repr(total),
        "Check the weights for NaN, or evaluate in float32.",
    )
    return math.exp(min(total / count, 700.0))
