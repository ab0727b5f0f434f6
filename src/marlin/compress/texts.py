"""Token streams that recovery trains on: the calibration text, and text that the dense model writes itself.

Owns keeping a held-out tail of the calibration text, the beginnings of what the model writes, and drawing batches. A
batch is a function of seed and step alone, so a run that was interrupted goes on with the batches it would have seen.
Knows nothing of losses and weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin.compress.calibration import begun
from marlin.compress.sampling import FREE
from marlin.errors import require

OP = "recover"
HELD_OUT_SHARE, MAX_HELD_OUT_WINDOWS = 0.07, 32
PROMPT_TOKENS = 16
TEXT_SHARE, BEGIN_SHARE = 0.375, 0.125


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


def prompts(
    stream: torch.Tensor,
    vocabulary: int,
    rows: int,
    round_index: int,
    seed: int,
    begin: int | None = None,
    always: int | None = None,
) -> torch.Tensor:
    """Beginnings to continue, int64 [rows, P]: pieces of the text, single tokens drawn evenly from the vocabulary, and
    the token `begin`, if any, that texts of the model may begin with; FREE after a single token.

    always: the token that all texts begin with, if any: it stands before each, and alone where `begin` would stand.
    Why several: the first stay near the text, the others go wherever the model does.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + round_index) % 2**63)
    starts = torch.randint(0, max(stream.numel() - PROMPT_TOKENS, 1), (rows,), generator=generator)
    pieces = stream.cpu()[starts.unsqueeze(1) + torch.arange(PROMPT_TOKENS)]
    single = torch.full((rows, PROMPT_TOKENS), FREE)
    single[:, 0] = torch.randint(0, vocabulary, (rows,), generator=generator)
    kind = torch.rand(rows, generator=generator)
    begin = begin if always is None else FREE
    if begin is not None:
        single[kind > 1 - BEGIN_SHARE, 0] = begin
    found = torch.where((kind < TEXT_SHARE).unsqueeze(1), pieces, single)
    return found if always is None else torch.cat([torch.full_like(found[:, :1], always), found], dim=1)


@dataclass
class Batches:
    """Windows of `length` tokens at random offsets of several streams, each with its share of the rows.

    streams: int64 [any], on the device that batches are made on. shares: add up to 1. begin: stands in the place of the
    first token of each window, if given.
    """

    streams: list[torch.Tensor]
    shares: list[float]
    length: int
    rows: int
    seed: int
    begin: int | None = None

    def __call__(self, step: int) -> torch.Tensor:
        """Batch number `step`: int64 [rows, length]."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        picks = torch.multinomial(torch.tensor(self.shares), self.rows, replacement=True, generator=generator)
        parts = []
        for index, stream in enumerate(self.streams):
            count = int((picks == index).sum())
            if count:
                starts = torch.randint(0, stream.numel() - self.length + 1, (count,), generator=generator)
                if stream.is_cuda:
                    # Why pinned: the copy is then queued, and the host runs ahead of the device.
                    starts = starts.pin_memory().to(stream.device, non_blocking=True)
                columns = starts.unsqueeze(1) + torch.arange(self.length, device=stream.device)
                parts.append(stream[columns])
        return begun(torch.cat(parts), self.begin)
