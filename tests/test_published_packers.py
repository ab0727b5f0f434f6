"""Packers of the published formats, by the place of each single value; and that the readers undo them.

Other test modules write whole checkpoints with these. They share no code with the readers: those cut words up with
views, these compute an index for every value. Both are held to files of the original tools in test_published_files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, top2_mask
from marlin.formats.published import AWQ, GPTQ, GPTQ_MARLIN_24, MARLIN, MARLIN_24, PACK_QUANTIZED, Facts, Format

Tensors = dict[str, torch.Tensor]


def random_weight(n: int, k: int, group_size: int, sparse: bool, dtype: torch.dtype = torch.float16) -> Weight:
    groups = 1 if group_size == -1 else k // group_size
    scales = (torch.rand(n, groups) * 0.02 + 0.005).to(dtype)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    if not sparse:
        codes[0, :4] = 1  # Why: whatever the draw, three non-zeros in a group of four.
        return DenseInt4Weight(codes, scales, group_size)
    return CompressedWeight.from_codes(codes, top2_mask(torch.rand(n, k)), scales, group_size)


def _words(nibbles: np.ndarray, word: np.ndarray, place: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """int32 words of shape, with each nibble at place (0 to 7) of the word of that flat index."""
    words = np.zeros(shape[0] * shape[1], dtype=np.uint32)
    np.bitwise_or.at(words, word.ravel(), nibbles.astype(np.uint32).ravel() << (4 * place.ravel()).astype(np.uint32))
    return torch.from_numpy(words.view(np.int32).reshape(shape).copy())


def _marlin_words(stored: torch.Tensor, sparse: bool) -> torch.Tensor:
    """stored [K', N], 0 to 15, in the order of the Marlin kernels: int32 [K' / 16, 2 N]."""
    rows, n = stored.shape
    k, column = np.meshgrid(np.arange(rows), np.arange(n), indexing="ij")
    quad, low, high = k % 8 // 2, k % 2, k % 16 // 8
    c = column % 64
    if sparse:
        lane_column, block, j = c // 8, c % 8 // 4, c % 4
    else:
        lane_column, block, j = c % 8, c % 16 // 8, c // 16
    word = k // 16 * 2 * n + column // 64 * 128 + (4 * lane_column + quad) * 4 + j
    return _words(stored.numpy(), word, 4 * low + 2 * block + high, (rows // 16, 2 * n))


def _reordered_meta(positions: torch.Tensor) -> torch.Tensor:
    """positions [N, K/4] as int16 words of four, rows and columns moved as CUTLASS does: int16 [K/32, 2 N]."""
    n, quarters = positions.shape
    fours = positions.numpy().astype(np.uint16).reshape(n, quarters // 4, 4)
    words = fours[..., 0] | fours[..., 1] << 4 | fours[..., 2] << 8 | fours[..., 3] << 12
    row, column = np.meshgrid(np.arange(n), np.arange(quarters // 4), indexing="ij")
    to = row // 64 * 64 + row % 64 // 8 * 4 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32
    up = (to % 2 == 1) & (column % 2 == 0)
    down = (to % 2 == 0) & (column % 2 == 1)
    to, column = to + down - up.astype(int), column - down.astype(int) + up
    flat = np.zeros(n * quarters // 4, dtype=np.uint16)
    flat[column // 2 * 2 * n + to * 2 + column % 2] = words
    return torch.from_numpy(flat.view(np.int16).reshape(quarters // 8, 2 * n).copy())


def _permuted(scales: torch.Tensor, order: list[int]) -> torch.Tensor:
    """[N, G] as [G, N], every run of columns in this order."""
    groups = scales.shape[1]
    return scales.t().reshape(groups, -1, len(order))[..., order].reshape(groups, -1).contiguous()


_ORDER_24 = [0, 4, 1, 5, 2, 6, 3, 7]
_ORDER_GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
_ORDER_SINGLE = [2 * i + 8 * a + b for i in range(4) for a in range(4) for b in range(2)]


def _pack_24(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(weight, CompressedWeight)
    return _marlin_words(weight.codes.t() + 8, sparse=True), _reordered_meta(weight.positions)


def pack_marlin_24(weight: Weight) -> Tensors:
    words, meta = _pack_24(weight)
    grouped = weight.group_size != -1 and weight.group_size < weight.k // 2
    scales = _permuted(weight.scales, _ORDER_24 if grouped else [0])
    return {"weight_packed": words, "scale_packed": scales, "meta": meta}


def pack_gptq_marlin_24(weight: Weight) -> Tensors:
    words, meta = _pack_24(weight)
    grouped = weight.group_size != -1 and weight.group_size < weight.k
    return {"B_24": words, "B_meta": meta, "s": _permuted(weight.scales, _ORDER_24 if grouped else [0])}


def pack_marlin(weight: Weight) -> Tensors:
    order = _ORDER_GROUPED if weight.scales.shape[1] > 1 else _ORDER_SINGLE
    return {"B": _marlin_words(weight.dense_codes().t() + 8, False), "s": _permuted(weight.scales, order)}


def pack_pack_quantized(weight: Weight) -> Tensors:
    n, k = weight.n, weight.k
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    stored = weight.dense_codes().numpy() + 8
    packed = _words(stored, row * (k // 8) + column // 8, column % 8, (n, k // 8))
    return {"weight_packed": packed, "weight_scale": weight.scales, "weight_shape": torch.tensor([n, k])}


def _zeros(groups: int, n: int, nibble: int) -> torch.Tensor:
    word = sum(nibble << 4 * i for i in range(8))
    return torch.from_numpy(np.full((groups, n // 8), word, dtype=np.uint32).view(np.int32))


def pack_gptq(weight: Weight, zero_nibble: int = 7) -> Tensors:
    n, k, groups = weight.n, weight.k, weight.scales.shape[1]
    row, column = np.meshgrid(np.arange(k), np.arange(n), indexing="ij")
    stored = weight.dense_codes().t().numpy() + 8
    return {
        "qweight": _words(stored, row // 8 * n + column, row % 8, (k // 8, n)),
        "qzeros": _zeros(groups, n, zero_nibble),
        "scales": weight.scales.t().contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


def pack_awq(weight: Weight) -> Tensors:
    n, k = weight.n, weight.k
    row, column = np.meshgrid(np.arange(k), np.arange(n), indexing="ij")
    place = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])[column % 8]
    stored = weight.dense_codes().t().numpy() + 8
    return {
        "qweight": _words(stored, row * (n // 8) + column // 8, place, (k, n // 8)),
        "qzeros": _zeros(weight.scales.shape[1], n, 8),
        "scales": weight.scales.t().contiguous(),
    }


def pack_bitmask(weight: torch.Tensor, mask: torch.Tensor) -> Tensors:
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    kept = weight[mask].view(weight.shape[0], -1)
    return {"compressed": kept, "bitmask": torch.from_numpy(bits), "shape": torch.tensor([[s] for s in weight.shape])}


PACKERS: dict[str, tuple[Format, Callable[[Weight], Tensors]]] = {
    "marlin-24": (MARLIN_24, pack_marlin_24),
    "gptq-marlin-24": (GPTQ_MARLIN_24, pack_gptq_marlin_24),
    "marlin": (MARLIN, pack_marlin),
    "pack-quantized": (PACK_QUANTIZED, pack_pack_quantized),
    "gptq": (GPTQ, pack_gptq),
    "awq": (AWQ, pack_awq),
}
SPARSE_ONLY = ("marlin-24", "gptq-marlin-24")
FACTS = {"gptq": Facts(zero_nibble=7)}

# n, k, group_size: smallest, odd multiples, several runs of 64, one group, two groups, many.
SHAPES = [(64, 32, -1), (64, 96, 32), (192, 128, 128), (128, 128, 64), (64, 320, 64), (320, 256, -1)]


CASES = [
    pytest.param(name, *shape, sparse, id=f"{name}-n{shape[0]}-k{shape[1]}-g{shape[2]}-{'sp24' if sparse else 'dense'}")
    for name in PACKERS
    for shape in SHAPES
    for sparse in ((True,) if name in SPARSE_ONLY else (True, False))
]


@pytest.mark.parametrize(("name", "n", "k", "group_size", "sparse"), CASES)
def test_reader_undoes_packer(name: str, n: int, k: int, group_size: int, sparse: bool):
    form, packer = PACKERS[name]
    weight = random_weight(n, k, group_size, sparse)
    facts = Facts((group_size,), FACTS.get(name, Facts()).zero_nibble)
    read = form.read(packer(weight), facts, "layer")
    assert read.kind == weight.kind
    assert read.group_size == group_size
    assert torch.equal(read.dense_codes(), weight.dense_codes())
    assert torch.equal(read.scales, weight.scales)
    if name in SPARSE_ONLY:
        assert torch.equal(read.positions, weight.positions)  # kept zeros included
