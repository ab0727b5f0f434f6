"""Readers of weights in the order of the published Marlin kernels: `marlin-24`, GPTQ's `marlin_24`, and `marlin`.

Owns those three orders, drawn here. All hold K by N in tiles of 16 rows (along K; of kept values in the sparse kinds)
by 64 columns (along N), 128 words of int32 per tile, tiles of one K next to each other: [K/16, 2N], or [K/32, 2N] where
half of K is kept. Word w of a tile belongs to thread lane = w / 4 of a warp, 4 col + quad, and its nibble, of three
bits (low, block, high), holds code + 8 of

    k = 8 * high + 2 * quad + low                                    (both)
    n = 16 * (w % 4) + 8 * block + col                               (dense)
    n = 16 * (col / 2) + 8 * (col % 2) + 4 * block + w % 4           (2:4)

Metadata of the 2:4 kinds are int16, four nibbles `i0 | i1 << 2` for 16 columns of K, in CUTLASS's reordered layout: for
row n = 64 R + 8 a + 4 b + 2 c + d and word 2 C + e of that row, at index [C, R, c, a, d, e, b].

Scales [G, N] are permuted in runs of columns, in other ways when there is one per row (see `_SCALES`).
Knows nothing of files and configs. Source: the packers of github.com/IST-DASLab/marlin, of compressed-tensors 0.13
(marlin-24) and of vLLM 0.14 (GPTQ marlin_24), whose files the tests read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from marlin.formats import sparsity
from marlin.formats.published.common import (
    COMPRESS_AGAIN,
    COPY_AGAIN,
    Facts,
    Format,
    check_extent,
    check_leaves,
    check_scales,
    check_tensor,
    group_size_of,
    nibbles,
    op_of,
    weight_of_codes,
)
from marlin.formats.safetensors_header import refuse
from marlin.formats.weight import CompressedWeight, Weight

_RUN = 64  # columns of N in a tile

# How a run of stored scales is cut up (shape), and the order of its parts that gives rising columns.
_SCALES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "marlin, grouped": ((8, 8), (1, 0)),
    "marlin, per row": ((4, 4, 2), (1, 0, 2)),
    "2:4, grouped": ((4, 2), (1, 0)),
    "2:4, per row": ((8,), (0,)),
}


def _unpermute_scales(scales: Tensor, order: str) -> Tensor:
    """Stored scales [G, N] to [N, G] in rising columns."""
    shape, parts = _SCALES[order]
    groups, n = scales.shape
    runs = scales.reshape(groups, -1, *shape).permute(0, 1, *(2 + part for part in parts))
    return runs.reshape(groups, n).t().contiguous()


def _check_words(op: str, name: str, words: Tensor, scales: Tensor, k_per_row: int) -> tuple[int, int]:
    """(N, K) of words [K / k_per_row, 2N]. Raises: CheckpointError (dtypes, shapes, 8 bits)."""
    check_tensor(op, "scales", scales, (torch.float16,), (-1, -1))
    n = scales.shape[1]
    if words.ndim == 2 and words.shape[1] == 4 * n:
        raise refuse(op, "weights must have 4 bits", f"8 ({name} has 4 words per output row)", COMPRESS_AGAIN)
    check_tensor(op, name, words, (torch.int32,), (-1, 2 * n))
    k = words.shape[0] * k_per_row
    check_extent(op, n, k)
    if n % _RUN:
        raise refuse(op, f"N must be a multiple of {_RUN} in this order", f"N={n}", COPY_AGAIN)
    check_scales(op, scales)
    return n, k


def _unpack_dense(words: Tensor) -> Tensor:
    """Words [K/16, 2N] to codes int8 [N, K]."""
    tiles, n = words.shape[0], words.shape[1] // 2
    parts = nibbles(words).view(tiles, n // _RUN, 8, 4, 4, 2, 2, 2)  # K tile, run, col, quad, w % 4, low, block, high
    codes = parts.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(n, tiles * 16)
    return codes.view(torch.int8) - 8


def _unpack_24(words: Tensor) -> Tensor:
    """Words [K/32, 2N] to kept codes int8 [N, K/2]."""
    tiles, n = words.shape[0], words.shape[1] // 2
    parts = nibbles(words).view(tiles, n // _RUN, 8, 4, 4, 2, 2, 2)
    codes = parts.permute(1, 2, 6, 4, 0, 7, 3, 5).reshape(n, tiles * 16)
    return codes.view(torch.int8) - 8


def _unpack_meta(meta: Tensor, n: int, k: int) -> Tensor:
    """Reordered metadata, int16 of n * k / 16 elements, to positions uint8 [N, K/4]."""
    parts = meta.contiguous().view(k // 32, n // 64, 2, 8, 2, 2, 2)  # C, R, c, a, d, e, b
    rows = parts.permute(1, 3, 6, 2, 4, 0, 5).reshape(n, k // 16)
    return nibbles(rows).view(n, k // 4)


def _read_24(form: Format, tensors: Mapping[str, Tensor], facts: Facts, layer: str, most_in_single: int) -> Weight:
    """A 2:4 weight; scales of up to most_in_single groups lie in the order of one."""
    op = op_of(form.name, layer)
    check_leaves(op, tuple(tensors), form.required, form.optional)
    (words_name, _, meta_name), (words, scales, meta) = form.required, (tensors[leaf] for leaf in form.required)
    n, k = _check_words(op, words_name, words, scales, 32)
    check_tensor(op, meta_name, meta, (torch.int16,), (k // 32, 2 * n))
    groups = scales.shape[0]
    group_size = group_size_of(op, k, groups, facts)
    positions = _unpack_meta(meta, n, k)
    if not sparsity.positions_are_legal(positions):
        need = f"every nibble of {meta_name} must hold two rising positions (i0 | i1 << 2 with i0 < i1)"
        raise refuse(op, need, "an illegal nibble", COPY_AGAIN)
    order = "2:4, per row" if groups <= most_in_single else "2:4, grouped"
    return CompressedWeight(_unpack_24(words), positions, _unpermute_scales(scales, order), group_size).validate()


def read_marlin_24(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """compressed-tensors `marlin-24`, 4 bits: a `CompressedWeight`, bit for bit.

    tensors: weight_packed int32 [K/32, 2N], scale_packed float16 [G, N], meta int16 [K/32, 2N].
    The writer compares group_size with K/2, so scales of two groups lie in the order of one.
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, 8 bits, group size, illegal metadata).
    """
    return _read_24(MARLIN_24, tensors, facts, layer, most_in_single=2)


def read_gptq_marlin_24(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """GPTQ `marlin_24`, 4 bits: a `CompressedWeight`, bit for bit.

    tensors: B_24 int32 [K/32, 2N], s float16 [G, N], B_meta int16 [K/32, 2N]; `workspace`, scratch of the published
    kernel, is not read.
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, 8 bits, group size, illegal metadata).
    """
    return _read_24(GPTQ_MARLIN_24, tensors, facts, layer, most_in_single=1)


def read_marlin(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """Dense `marlin`, bit for bit: a `CompressedWeight` if its zeros are 2:4, else a `DenseInt4Weight`.

    tensors: B int32 [K/16, 2N], s float16 [G, N]; `workspace`, scratch of the published kernel, is not read.
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, group size).
    """
    op = op_of(MARLIN.name, layer)
    check_leaves(op, tuple(tensors), MARLIN.required, MARLIN.optional)
    words, scales = tensors["B"], tensors["s"]
    _, k = _check_words(op, "B", words, scales, 16)
    groups = scales.shape[0]
    group_size = group_size_of(op, k, groups, facts)
    order = "marlin, grouped" if groups > 1 else "marlin, per row"
    return weight_of_codes(op, _unpack_dense(words), _unpermute_scales(scales, order), group_size)


MARLIN_24 = Format("marlin-24", ("weight_packed", "scale_packed", "meta"), (), read_marlin_24)
GPTQ_MARLIN_24 = Format("gptq marlin_24", ("B_24", "s", "B_meta"), ("workspace",), read_gptq_marlin_24)
MARLIN = Format("marlin", ("B", "s"), ("workspace",), read_marlin)
