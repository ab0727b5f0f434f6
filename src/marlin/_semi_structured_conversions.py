"""`mask_creator`, under the name and path of the published package. The rule itself is `marlin.formats.top2_mask`."""

from __future__ import annotations

import torch

from marlin.errors import message, require
from marlin.formats.sparsity import top2_mask

_CODE_OFFSET = 8


def mask_creator(tensor: torch.Tensor) -> torch.Tensor:
    """The 2:4 mask of a tensor: 1.0 where one of the two largest magnitudes of four consecutive entries is, else 0.0.

    Shapes: any, four entries in row-major order to a group; returns float32 of the same shape and device. On a tie the
    lower index stays. Integer tensors are INT4 codes stored with offset 8 (0..15), so their magnitude is |code - 8|.
    The published function ranks the stored code instead, whose largest values are the positive weights: it prunes
    negative weights whatever their size. Masks of floating-point tensors agree with it but for ties.
    Raises: ValueError (the number of entries is no multiple of 4, NaN), TypeError (bool or complex).
    """
    op = "mask_creator"
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(message(op, "tensor must hold real numbers or INT4 codes", str(tensor.dtype)))
    require(tensor.numel() % 4 == 0, op, "the number of entries must be a multiple of 4", str(tuple(tensor.shape)))
    groups = tensor.detach().reshape(-1, 4)
    if not tensor.is_floating_point():
        groups = groups.to(torch.int16) - _CODE_OFFSET
    return top2_mask(groups.abs()).reshape(tensor.shape).float()
