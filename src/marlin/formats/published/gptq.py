"""Readers of GPTQ's and AWQ's own INT4 tensors, where they are symmetric and in the order of the columns.

Owns both layouts. GPTQ: `qweight` int32 [K/8, N] with nibbles along K, `qzeros` int32 [G, N/8] with nibbles along N.
AWQ: `qweight` int32 [K, N/8] and `qzeros` int32 [G, N/8], nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i].
Nibbles are code + zero point, `scales` are [G, N]. Knows nothing of files and configs.
Source: AutoGPTQ 0.7 and AutoAWQ 0.2 (gemm), whose files the tests read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from marlin.formats.published.common import (
    COMPRESS_AGAIN,
    COPY_AGAIN,
    Facts,
    Format,
    check_leaves,
    check_tensor,
    group_size_of,
    nibbles,
    op_of,
    weight_of_codes,
)
from marlin.formats.safetensors_header import refuse
from marlin.formats.weight import SCALE_DTYPES, Weight


def _check_zero_points(op: str, qzeros: Tensor, facts: Facts) -> None:
    """Zero points must be 8 everywhere; their order does not matter."""
    stored = nibbles(qzeros)
    if bool((stored != facts.zero_nibble).any()):
        shift = 8 - facts.zero_nibble
        got = f"zero points from {int(stored.min()) + shift} to {int(stored.max()) + shift} in qzeros"
        fix = COMPRESS_AGAIN
        if bool((stored == 8).all()):
            fix = 'If they are stored as they are (GPTQ version 2), set "checkpoint_format": "gptq_v2" in the config.'
        raise refuse(op, "quantization must be symmetric (zero points 8)", got, fix)


def _check_group_index(op: str, index: Tensor, k: int, groups: int) -> None:
    if index.numel() == 0:
        return
    check_tensor(op, "g_idx", index, (torch.int32, torch.int64), (k,))
    if not torch.equal(index.long(), torch.arange(k) // (k // groups)):
        need = "groups must follow the columns (no activation reordering by g_idx)"
        fix = f"Quantize the model again with desc_act=False. {COMPRESS_AGAIN}"
        raise refuse(op, need, "columns in another order (desc_act)", fix)


def read_gptq(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """Symmetric GPTQ INT4, bit for bit: a `CompressedWeight` if its zeros are 2:4, else a `DenseInt4Weight`.

    tensors: qweight int32 [K/8, N], scales [G, N], qzeros int32 [G, N/8], and g_idx [K] if it follows the columns.
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, group size, zero points, activation reordering).
    """
    op = op_of(GPTQ.name, layer)
    check_leaves(op, tuple(tensors), GPTQ.required, GPTQ.optional)
    words, scales, qzeros = (tensors[leaf] for leaf in GPTQ.required)
    check_tensor(op, "scales", scales, SCALE_DTYPES, (-1, -1))
    groups, n = scales.shape
    check_tensor(op, "qweight", words, (torch.int32,), (-1, n))
    k = words.shape[0] * 8
    index = tensors.get("g_idx")
    if qzeros.ndim == 2 and qzeros.shape[1] * 4 == n:
        raise refuse(op, "weights must have 4 bits", "8 (qzeros has N/4 words per group)", COMPRESS_AGAIN)
    check_tensor(op, "qzeros", qzeros, (torch.int32,), (groups, -(-n // 8)))
    group_size = group_size_of(op, k, groups, facts)
    if index is not None:
        _check_group_index(op, index, k, groups)
    _check_zero_points(op, qzeros, facts)
    codes = nibbles(words.t()).flatten(1).view(torch.int8) - 8
    return weight_of_codes(op, codes, scales.t(), group_size)


def read_awq(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """Symmetric AWQ INT4 ("gemm" order), bit for bit: a `CompressedWeight` if its zeros are 2:4, else dense INT4.

    tensors: qweight int32 [K, N/8], scales [G, N], qzeros int32 [G, N/8].
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, group size, zero points).
    """
    op = op_of(AWQ.name, layer)
    check_leaves(op, tuple(tensors), AWQ.required, AWQ.optional)
    words, scales, qzeros = (tensors[leaf] for leaf in AWQ.required)
    check_tensor(op, "scales", scales, SCALE_DTYPES, (-1, -1))
    groups, n = scales.shape
    if n % 8:
        raise refuse(op, "N must be a multiple of 8", f"N={n}", COPY_AGAIN)
    check_tensor(op, "qweight", words, (torch.int32,), (-1, n // 8))
    check_tensor(op, "qzeros", qzeros, (torch.int32,), (groups, n // 8))
    k = words.shape[0]
    group_size = group_size_of(op, k, groups, facts)
    _check_zero_points(op, qzeros, facts)
    # Nibble i has column 2i below four and 2i - 7 above, which is a transpose of [half, place].
    columns = nibbles(words).view(k, n // 8, 2, 4).transpose(2, 3).reshape(k, n)
    codes = columns.t().contiguous().view(torch.int8) - 8
    return weight_of_codes(op, codes, scales.t(), group_size)


GPTQ = Format("gptq", ("qweight", "scales", "qzeros"), ("g_idx",), read_gptq)
AWQ = Format("awq", ("qweight", "scales", "qzeros"), (), read_awq)
