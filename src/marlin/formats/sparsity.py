"""The 2:4 pattern: masks over groups of four consecutive weights along K, and their four-bit positions.

Owns: what a mask is, how a position nibble encodes it, and magnitude selection. Knows nothing of quantization.

A position nibble is `i0 | i1 << 2` with `0 <= i0 < i1 <= 3`: the indices of the two kept values, the metadata
nibble of the PTX ISA (section "Sparse matrix storage" of `mma.sp`). Only six nibbles are legal.
"""

from __future__ import annotations

import torch

from marlin.errors import require

LEGAL_NIBBLES = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)


def _nibble_is_legal_table(device: torch.device) -> torch.Tensor:
    table = torch.zeros(256, dtype=torch.bool, device=device)
    table[list(LEGAL_NIBBLES)] = True
    return table


def positions_are_legal(positions: torch.Tensor) -> bool:
    """Whether every entry of positions (uint8, any shape) is one of the six legal nibbles."""
    return bool(_nibble_is_legal_table(positions.device)[positions.long()].all())


def is_24(mask: torch.Tensor) -> bool:
    """Whether mask [N, K] (bool) keeps exactly two of every four consecutive entries along K."""
    if mask.ndim != 2 or mask.shape[1] % 4:
        return False
    return bool((mask.reshape(mask.shape[0], -1, 4).sum(-1) == 2).all())


def top2_mask(score: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four scores along the last dimension; on a tie the lower index stays.

    Shapes: score [..., K], any real dtype, K a multiple of 4; returns bool [..., K].
    Raises: ValueError (K not a multiple of 4, or NaN among the scores).
    """
    require(
        score.shape[-1] % 4 == 0, "top2_mask", "K must be a multiple of 4", f"K={score.shape[-1]}", "Pad the weight."
    )
    if score.is_floating_point() and bool(score.isnan().any()):
        raise ValueError("top2_mask: scores must not be NaN; got NaN. Check the weight and the calibration data.")
    groups = score.reshape(*score.shape[:-1], -1, 4)
    # Why: entry i is kept when fewer than two entries beat it; ties go to the lower index, so that the choice is
    # the same for every dtype and device (argsort and topk promise nothing about ties).
    a, b = groups.unsqueeze(-1), groups.unsqueeze(-2)
    index = torch.arange(4, device=score.device)
    beats = (b > a) | ((b == a) & (index.unsqueeze(0) < index.unsqueeze(1)))
    return (beats.sum(-1) < 2).reshape(score.shape)


def positions_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Position nibbles of a 2:4 mask.

    Shapes: mask [N, K] bool; returns uint8 [N, K/4].
    Raises: ValueError (mask is not 2:4).
    """
    require(
        is_24(mask),
        "positions_from_mask",
        "mask must keep exactly 2 of every 4 along K",
        f"shape {tuple(mask.shape)} with another pattern",
        "Build it with marlin.formats.top2_mask.",
    )
    groups = mask.reshape(mask.shape[0], -1, 4).to(torch.uint8)
    first = groups.argmax(-1)
    last = 3 - groups.flip(-1).argmax(-1)
    return (first | last << 2).to(torch.uint8)


def mask_from_positions(positions: torch.Tensor) -> torch.Tensor:
    """The 2:4 mask of position nibbles: uint8 [N, K/4] to bool [N, K]."""
    index = torch.arange(4, device=positions.device, dtype=torch.uint8)
    nibble = positions.unsqueeze(-1)
    mask = ((nibble & 3) == index) | ((nibble >> 2) == index)
    return mask.reshape(positions.shape[0], -1)


def kept_columns(positions: torch.Tensor) -> torch.Tensor:
    """Dense column of each kept value: positions uint8 [N, K/4] to int64 [N, K/2]."""
    base = torch.arange(positions.shape[1], device=positions.device).unsqueeze(-1) * 4
    pair = torch.stack((positions & 3, positions >> 2), dim=-1).long()
    return (base + pair).reshape(positions.shape[0], -1)
