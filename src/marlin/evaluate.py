"""Perplexity of a causal language model, and its distance from another one, by one fixed protocol.

Owns the protocol below. Knows nothing of compression or kernels: any model whose output has `.logits` can be measured.

Protocol: the token stream is cut into windows of `window` tokens without overlap; the first `limit` whole windows
count. Within a window tokens 1..window-1 are predicted from those before them; the first token is only context, and
where the model's texts begin with a special token (`begin`), that stands in its place. No other special token is added.
Perplexity is exp of the mean negative log-likelihood over all predicted tokens, summed in float64 from float32
log-probabilities. A comparison with the dense model takes the same positions: the mean of KL(dense || model) in nats,
and the share of positions at which both find the same token most likely.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from marlin.errors import message, require

POSITIONS_AT_ONCE = 256


def windows(token_ids: torch.Tensor, window: int, limit: int | None, begin: int | None = None) -> torch.Tensor:
    """The first `limit` whole windows of a token stream: int64 [any] to [W, window], `begin` in the place of the first
    token of each.

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
    rows = stream[: count * window].view(count, window)
    return rows if begin is None else torch.cat([torch.full_like(rows[:, :1], begin), rows[:, 1:]], dim=1)


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


@contextlib.contextmanager
def _inference(*models: Any) -> Iterator[None]:
    """While open, no gradients, and the models in evaluation mode; afterwards as they were."""
    modes = [bool(getattr(model, "training", False)) for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _exp_mean(op: str, total: float, count: int) -> float:
    """exp of the mean negative log-likelihood. Raises: ValueError (not finite)."""
    requirement, fix = (
        "the model must give finite log-likelihoods",
        "Check the weights for NaN, or evaluate in float32.",
    )
    require(math.isfinite(total), op, requirement, repr(total), fix)
    return math.exp(min(total / count, 700.0))


def perplexity(
    model: Any,
    token_ids: torch.Tensor,
    *,
    window: int = 1024,
    limit: int | None = 40,
    begin: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of model on a token stream, by the protocol of this module.

    token_ids: int64, flattened. begin: what `marlin.api.beginning` says of the tokenizer. The model computes in its own
    dtype; the figures of this project are taken in float32.
    progress(done, total) is called after each window.
    Raises: ValueError (text shorter than a window, or the model gives NaN or infinity), TypeError (dtype).
    """
    rows = windows(token_ids, window, limit, begin)
    total, count = 0.0, 0
    with _inference(model):
        for index, row in enumerate(rows):
            values = log_likelihoods(model, row.unsqueeze(0))
            total -= float(values.double().sum())
            count += values.numel()
            if progress is not None:
                progress(index + 1, len(rows))
    return _exp_mean("perplexity", total, count)


@dataclass(frozen=True)
class Comparison:
    """perplexity: of the model, dense_perplexity: of the dense one. divergence: mean KL(dense || model), nats a token.
    agreement: share of positions, 0..1, where both find the same next token most likely. tokens: predicted ones."""

    perplexity: float
    dense_perplexity: float
    divergence: float
    agreement: float
    tokens: int


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Of all positions of a window [T] but the last, in the model's dtype, on its device: [T-1, V]."""
    out: torch.Tensor = model(input_ids=row.unsqueeze(0).to(model_device(model)), use_cache=False).logits
    return out[0, :-1]


def _sums(own: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 [4]: negative log-likelihoods of own and other, divergence, agreement; summed over [R, V] logits."""
    mine, theirs = own.float().log_softmax(-1), other.to(own.device).float().log_softmax(-1)
    picked = [-x.gather(-1, targets.unsqueeze(-1)).double().sum() for x in (mine, theirs)]
    divergence = (theirs.exp() * (theirs - mine)).sum(-1).double().sum()
    return torch.stack([*picked, divergence, (mine.argmax(-1) == theirs.argmax(-1)).double().sum()])


def compare(
    model: Any,
    dense: Any,
    token_ids: torch.Tensor,
    *,
    window: int = 1024,
    limit: int | None = 40,
    begin: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """How far model is from dense on a token stream, by the protocol of this module.

    token_ids: int64, flattened. begin: as for `perplexity`. dense: any model of the same vocabulary, on any device.
    progress(done, total) is called after each window.
    Raises: ValueError (text shorter than a window, vocabularies, NaN or infinity), TypeError (dtype).
    """
    op = "compare"
    rows = windows(token_ids, window, limit, begin)
    total = torch.zeros(4, dtype=torch.float64)
    with _inference(model, dense):
        for index, row in enumerate(rows):
            own, other = _logits(model, row), _logits(dense, row)
            sizes = f"{own.shape[-1]} and {other.shape[-1]} tokens"
            require(own.shape == other.shape, op, "both models must have the same vocabulary", sizes)
            targets = row[1:].to(own.device)
            for start in range(0, targets.numel(), POSITIONS_AT_ONCE):
                part = slice(start, start + POSITIONS_AT_ONCE)
                total += _sums(own[part], other[part], targets[part]).cpu()
            if progress is not None:
                progress(index + 1, len(rows))
    count = rows.shape[0] * (rows.shape[1] - 1)
    own_nll, dense_nll, divergence, agreeing = total.tolist()
    # Why max: rounding can leave the divergence of equal predictions a little below zero.
    perplexities = _exp_mean(op, own_nll, count), _exp_mean(op, dense_nll, count)
    return Comparison(*perplexities, max(divergence / count, 0.0), agreeing / count, count)
