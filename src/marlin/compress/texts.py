"""Token streams that recovery trains on: the calibration text, and text that the dense model writes itself.

Owns sampling from a model, keeping a held-out tail of the calibration text, and drawing batches. A batch is a function
of seed and step alone, so a run that was interrupted goes on with the batches it would have seen. Knows nothing of
losses and weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from marlin.errors import require

OP = "recover"
HELD_OUT_SHARE, MAX_HELD_OUT_WINDOWS = 0.07, 32
PROMPT_TOKENS = 16


def split_held_out(stream: torch.Tensor, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training stream, held-out windows [W, length]): the tail of the text, which no training batch draws from.

    W is a multiple of rows where there is enough text, so that validation runs on batches of one shape.

    Raises: ValueError (fewer than four windows of text).
    """
    count = stream.numel() // length
    fix = "Use more text, or a smaller length."
    require(count >= 4, OP, f"the text must hold at least 4 windows of {length} tokens", f"{stream.numel()}", fix)
    held = min(max(1, int(count * HELD_OUT_SHARE)), MAX_HELD_OUT_WINDOWS)
    held -= held % rows if held > rows else 0
    cut = stream.numel() - held * length
    return stream[:cut], stream[cut:].view(held, length)


def prompts(stream: torch.Tensor, vocabulary: int, rows: int, round_index: int, seed: int) -> torch.Tensor:
    """Beginnings to continue, int64 [rows, P]: in even rounds pieces of the text, in odd ones a single random token.

    Why both: the one kind stays near the text, the other goes wherever the model does.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + round_index) % 2**63)
    if round_index % 2:
        return torch.randint(0, vocabulary, (rows, 1), generator=generator)
    starts = torch.randint(0, max(stream.numel() - PROMPT_TOKENS, 1), (rows,), generator=generator)
    return stream.cpu()[starts.unsqueeze(1) + torch.arange(PROMPT_TOKENS)]


@torch.no_grad()
def sample(
    model: Any,
    beginnings: torch.Tensor,
    length: int,
    *,
    seed: int,
    temperature: float = 1.0,
    deadline: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Continue beginnings int64 [B, P] to `length` tokens by sampling from model's distribution, on its device.

    Returns int64 [B, T] on the CPU, T <= length; shorter when time.monotonic() passes deadline.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = beginnings.to(device)
    found, past, step = [ids], None, ids
    for index in range(length - ids.shape[1]):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        scores = out.logits[:, -1].float() / temperature
        # Why: the largest of log p plus Gumbel noise is a draw from p; much faster than torch.multinomial.
        noise = torch.empty_like(scores).exponential_(generator=generator)
        step = (scores.softmax(-1) / noise).argmax(-1, keepdim=True)
        found.append(step)
        if index % 16 == 0:
            if progress is not None:
                progress(index, length)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if time.monotonic() > deadline:
                break
    return torch.cat(found, 1).cpu()


@dataclass
class Batches:
    """Windows of `length` tokens at random offsets of several streams, each with its share of the rows.

    streams: int64 [any], on the device that batches are made on. shares: add up to 1.
    """

    streams: list[torch.Tensor]
    shares: list[float]
    length: int
    rows: int
    seed: int

    def __call__(self, step: int) -> torch.Tensor:
        """Batch number `step`: int64 [rows, length]."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        picks = torch.multinomial(torch.tensor(self.shares), self.rows, replacement=True, generator=generator)
        parts = []
        for index, stream in enumerate(self.streams):
            count = int((picks == index).sum())
            if count:
                starts = torch.randint(0, stream.numel() - self.length + 1, (count,), generator=generator)
                columns = starts.to(stream.device).unsqueeze(1) + torch.arange(self.length, device=stream.device)
                parts.append(stream[columns])
        return torch.cat(parts)
