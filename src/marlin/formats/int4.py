"""Symmetric INT4 with one scale per group of consecutive dense positions along K.

Owns: the code range, what `group_size` means, the scale of a group, rounding to codes. Knows nothing of sparsity:
a mask enters only as "these entries count".

weight[n, k] = codes[n, k] * scales[n, k // group_size], codes in -8..7. `group_size` counts dense positions; -1
means one scale per output row.
"""

from __future__ import annotations

import torch

from marlin.errors import require

QMIN, QMAX = -8, 7
GROUP_SIZES = (32, 64, 128, -1)


def num_groups(k: int, group_size: int, op: str = "int4") -> int:
    """Groups along K. Raises: ValueError (group_size unknown, or K not a multiple of it)."""
    require(group_size in GROUP_SIZES, op, f"group_size must be one of {GROUP_SIZES}", f"group_size={group_size}")
    if group_size == -1:
        return 1
    require(
        k % group_size == 0,
        op,
        f"K must be a multiple of group_size={group_size}",
        f"K={k}",
        "Use a smaller group_size, or -1 for one scale per row.",
    )
    return k // group_size


def group_scales(
    weight: torch.Tensor, group_size: int, mask: torch.Tensor | None = None, search_steps: int = 0
) -> torch.Tensor:
    """Scales of weight's groups: largest kept magnitude over 7.5, or the candidate of least squared error.

    Shapes (G groups): weight [N, K] float; mask [N, K] bool, entries that count (all when None);
    returns [N, G] float32, positive and finite.
    search_steps: how many shrunken clips (down to half of the range) compete by squared error; 0 takes the range.
    Raises: ValueError (group_size, or weight not finite).
    """
    n, k = weight.shape
    groups = num_groups(k, group_size, "group_scales")
    kept = weight.float() if mask is None else weight.float() * mask
    require(
        bool(kept.isfinite().all()),
        "group_scales",
        "weight must be finite",
        "NaN or infinity",
        "Check the checkpoint that it came from.",
    )
    grouped = kept.reshape(n, groups, -1)
    # Why 7.5: the codes -8..7 are centred on -0.5, and the mean of the two ends clips least on symmetric weights.
    base = grouped.abs().amax(-1) / 7.5
    base = torch.where(base > 0, base, torch.ones_like(base))
    best, best_error = base, torch.full_like(base, torch.inf)
    for step in range(search_steps + 1):
        scale = base * (1.0 - 0.5 * step / max(search_steps, 1))
        codes = (grouped / scale.unsqueeze(-1)).round_().clamp_(QMIN, QMAX)
        error = (codes * scale.unsqueeze(-1) - grouped).square_().sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def expand_scales(scales: torch.Tensor, k: int) -> torch.Tensor:
    """Scales of every dense position: [N, G] to [N, K]."""
    return scales.repeat_interleave(k // scales.shape[1], dim=1)


def quantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes nearest to weight (ties to even): weight [N, K], scales [N, G] to int8 [N, K]; 0 / 0 is 0."""
    n, k = weight.shape
    grouped = weight.float().reshape(n, scales.shape[1], -1) / scales.float().unsqueeze(-1)
    return grouped.nan_to_num_(0.0).round_().clamp_(QMIN, QMAX).to(torch.int8).reshape(n, k)
