"""compressed-tensors `sparse-24-bitmask`: a 2:4 weight that was pruned and not quantized.

Owns that format: `compressed` [N, K/2], the kept values in the order of their columns; `bitmask` uint8 [N, K/8], one
bit per column, lowest first; `shape` int64, N and K. Quantizing what it reads is the caller's business.
Source: compressed-tensors 0.13, whose files the tests read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from marlin.formats import sparsity
from marlin.formats.published.common import (
    COPY_AGAIN,
    Facts,
    Format,
    check_extent,
    check_leaves,
    check_tensor,
    op_of,
)
from marlin.formats.safetensors_header import refuse
from marlin.formats.weight import SCALE_DTYPES, Weight


def read_bitmask(tensors: Mapping[str, Tensor], layer: str = "") -> tuple[Tensor, Tensor]:
    """(weight [N, K] in its own dtype, mask bool [N, K]) of the three tensors, exactly.

    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, a mask that is not 2:4, values not finite).
    """
    op = op_of(SPARSE_24_BITMASK.name, layer)
    check_leaves(op, tuple(tensors), SPARSE_24_BITMASK.required, ())
    values, bits, shape = (tensors[leaf] for leaf in SPARSE_24_BITMASK.required)
    extents = shape.flatten().tolist() if shape.dtype in (torch.int64, torch.int32) else []
    if len(extents) != 2 or min(extents) < 1:
        raise refuse(op, "shape must hold N and K as integers", f"{shape.dtype} {extents[:4]}", COPY_AGAIN)
    n, k = extents
    check_extent(op, n, k)
    check_tensor(op, "compressed", values, SCALE_DTYPES, (n, k // 2))
    check_tensor(op, "bitmask", bits, (torch.uint8,), (n, k // 8))
    mask = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).view(n, k).bool()
    if not sparsity.is_24(mask):
        raise refuse(op, "bitmask must keep exactly 2 of every 4 along K", "another pattern", COPY_AGAIN)
    if not bool(values.isfinite().all()):
        raise refuse(op, "values must be finite", "NaN or infinity", COPY_AGAIN)
    dense = torch.zeros(n, k, dtype=values.dtype)
    dense.masked_scatter_(mask, values)
    return dense, mask


def _refuse_unquantized(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    raise refuse(
        op_of(SPARSE_24_BITMASK.name, layer),
        "weights must be quantized",
        "2:4 weights in floating point",
        "Pass --quantize to round them to INT4 (a scale per group, chosen by squared error), or keep more of the "
        "model's quality: marlin compress MODEL OUT.",
    )


SPARSE_24_BITMASK = Format("sparse-24-bitmask", ("compressed", "bitmask", "shape"), (), _refuse_unquantized)
