"""The emulator of `mma.sp.m16n8k32` and `mma.m16n8k16`: registers land where the PTX ISA says, and pack agrees."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
import torch

from marlin.formats.layouts import pack
from marlin.testing import cases, emulator, oracle

EXTENTS = [
    (n, k, g)
    for n, k in [(8, 32), (64, 64), (72, 96), (200, 160), (200, 576), (128, 256)]
    for g in cases.GROUP_SIZES
    if g == -1 or k % g == 0
]


@dataclass(frozen=True)
class Words:
    """Packed fields written by hand, so that nothing here went through the packer. One tile, all codes 0, scales 1."""

    kind: str
    codes: torch.Tensor
    meta: torch.Tensor | None
    scales: torch.Tensor
    n: int = 64
    k: int = 64
    group_size: int = -1


def _tile(kind: str) -> Words:
    sparse = kind == "w4a16_sp24"
    codes = torch.full((1, 1, 256 if sparse else 512), -0x77777778, dtype=torch.int32)  # nibbles 8: code 0
    meta = torch.full((1, 1, 128), 0x44444444, dtype=torch.int32) if sparse else None
    return Words(kind, codes, meta, torch.ones(1, 1, 64, dtype=torch.float16))


def _set_nibble(words: torch.Tensor, word: int, nibble: int, value: int) -> None:
    bits = int(words[0, 0, word]) & 0xFFFFFFFF
    bits = bits & ~(15 << 4 * nibble) | value << 4 * nibble
    words[0, 0, word] = bits - (1 << 32) if bits >> 31 else bits


# --- one register at a time


@pytest.mark.parametrize(
    ("lane", "warp", "step", "register", "half", "row", "column"),
    [
        (0, 0, 0, 0, 0, 0, 0),  # a0: row groupID, first column of the thread
        (0, 0, 0, 0, 1, 0, 1),  # a1: the next column
        (0, 0, 0, 1, 0, 8, 0),  # a2: row groupID + 8
        (0, 0, 0, 2, 0, 0, 8),  # a4: eight columns on
        (0, 0, 0, 3, 1, 8, 9),  # a7
        (3, 0, 0, 0, 0, 0, 6),  # the last thread of the first quad
        (4, 0, 0, 0, 0, 1, 0),  # the first thread of the second quad
        (31, 3, 3, 3, 1, 63, 63),  # the last of everything
        (22, 1, 2, 2, 1, 21, 45),
    ],
)
def test_dense_register_holds_the_row_and_column_of_the_isa(
    lane: int, warp: int, step: int, register: int, half: int, row: int, column: int
):
    tile = _tile("w4a16_dense")
    _set_nibble(tile.codes, 4 * (32 * warp + lane) + step, 4 * half + register, 8 + 3)
    dense = emulator.operand(tile)
    assert dense.nonzero().tolist() == [[row, column]]
    assert float(dense[row, column]) == 3


@pytest.mark.parametrize(
    ("lane", "warp", "step", "register", "half", "supplier", "nibble", "index", "row", "column"),
    [
        # Selector 0: threads 0 (columns 0..15) and 1 (16..31) of each quad supply the metadata.
        (0, 0, 0, 0, 0, 0, 0, 0b1110, 0, 2),
        (0, 0, 0, 0, 1, 0, 0, 0b1110, 0, 3),
        (2, 0, 0, 0, 0, 0, 2, 0b1101, 0, 8 + 1),
        (2, 0, 0, 1, 1, 0, 4 + 2, 0b1101, 8, 8 + 3),
        (0, 0, 0, 2, 0, 1, 0, 0b1001, 0, 16 + 1),
        (7, 0, 0, 3, 1, 5, 4 + 3, 0b1001, 9, 16 + 12 + 2),
        # Selector 1: threads 2 and 3.
        (0, 0, 1, 0, 0, 2, 0, 0b1110, 0, 32 + 2),
        (0, 0, 1, 2, 0, 3, 0, 0b1110, 0, 48 + 2),
        (31, 3, 1, 3, 1, 31, 7, 0b1100, 63, 63),
    ],
)
def test_sparse_register_holds_the_row_and_column_of_the_isa(
    lane: int,
    warp: int,
    step: int,
    register: int,
    half: int,
    supplier: int,
    nibble: int,
    index: int,
    row: int,
    column: int,
):
    tile = _tile("w4a16_sp24")
    assert tile.meta is not None
    _set_nibble(tile.codes, 2 * (32 * warp + lane) + step, 4 * half + register, 8 - 5)
    _set_nibble(tile.meta, 32 * warp + supplier, nibble, index)
    dense = emulator.operand(tile)
    assert dense.nonzero().tolist() == [[row, column]]
    assert float(dense[row, column]) == -5


def test_scale_word_holds_rows_g_and_g_plus_8():
    tile = _tile("w4a16_dense")
    tile = replace(tile, codes=torch.full_like(tile.codes, -0x66666667))  # nibbles 9: code 1
    words = torch.zeros(1, 1, 32, dtype=torch.int32)
    words[0, 0, 8 * 2 + 5] = 0x40003C00  # low half 1.0, high half 2.0
    tile = replace(tile, scales=words.view(torch.float16))
    dense = emulator.operand(tile)
    assert dense[:, 0].nonzero().flatten().tolist() == [32 + 5, 32 + 13]
    assert bool((dense[32 + 5] == 1).all()) and bool((dense[32 + 13] == 2).all())


def test_code_is_the_nibble_minus_eight():
    for value in range(16):
        tile = _tile("w4a16_dense")
        _set_nibble(tile.codes, 0, 0, value)
        assert float(emulator.operand(tile)[0, 0]) == value - 8


# --- against the canonical weight


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), EXTENTS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_one_hot_activations_give_back_the_weight_bit_for_bit(
    kind: str, n: int, k: int, group_size: int, dtype: torch.dtype
):
    weight = cases.random_weight(n, k, group_size, kind, dtype=dtype)
    product = emulator.linear(torch.eye(k, dtype=dtype), pack(weight))
    assert torch.equal(product.T.to(dtype), weight.to_dense())
    assert torch.equal(product.T, oracle.dequantize(weight))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_linear_is_the_oracles_product(kind: str):
    weight = cases.random_weight(72, 160, 32, kind)
    act, bias = cases.random_act(6, 160).view(2, 3, 160), cases.random_act(1, 72)[0]
    product = emulator.linear(act, pack(weight), bias)
    assert product.shape == (2, 3, 72) and product.dtype == torch.float64
    torch.testing.assert_close(product, oracle.linear(act, weight, bias), rtol=0, atol=1e-12)


def test_operand_of_128_by_256_takes_less_than_a_second_of_cpu_time():
    packed = pack(cases.random_weight(128, 256, 128))
    start = time.process_time()
    emulator.operand(packed)
    assert time.process_time() - start < 1.0


# --- padding


@pytest.mark.parametrize("kind", cases.KINDS)
def test_fill_padding_changes_nothing_of_full_tiles(kind: str):
    packed = pack(cases.random_weight(128, 128, 32, kind))
    filled = emulator.fill_padding(packed)
    assert torch.equal(filled.codes, packed.codes) and torch.equal(filled.scales, packed.scales)
    assert packed.meta is None or torch.equal(filled.meta, packed.meta)


def test_fill_padding_sets_every_bit_beyond_n_and_k():
    packed = pack(cases.random_weight(8, 32, -1))
    filled = emulator.fill_padding(packed)
    assert packed.meta is not None
    # 8 of 64 rows, 32 of 64 columns: 1/16 of the codes and metadata, 1/8 of the scales.
    for name, live in (("codes", 16), ("meta", 16), ("scales", 8)):
        raw, padded = (getattr(p, name).flatten().view(torch.uint8) for p in (packed, filled))
        nibbles = torch.stack((padded & 15, padded >> 4))
        assert int((nibbles != 15).sum()) <= nibbles.numel() // live
        assert bool(((padded == raw) | (padded & 15 == 15) | (padded >> 4 == 15)).all())
    zeroed = emulator.fill_padding(filled, 0x00)
    assert int((zeroed.codes != 0).sum()) <= 32


# --- what is refused


def test_linear_refuses_illegal_metadata():
    packed = pack(cases.random_weight(64, 64, 32))
    assert packed.meta is not None
    _set_nibble(packed.meta, 32 + 4 * 3 + 2, 5, 0b0101)  # warp 1, row 3 + 8, k-step 1, columns 4..7
    with pytest.raises(ValueError) as error:
        emulator.linear(torch.zeros(1, 64), packed)
    assert str(error.value) == (
        "emulator: metadata nibbles must name two columns in order; "
        "got 0b0101 for tile (0, 0), thread 45, k-step 1, register 1."
    )


def test_linear_refuses_activations_of_another_k():
    with pytest.raises(ValueError) as error:
        emulator.linear(torch.zeros(2, 64), pack(cases.random_weight(8, 32, 32)))
    assert str(error.value) == "emulator: act must have K=32 columns; got (2, 64)."


def test_linear_refuses_scales_that_kernels_do_not_read():
    with pytest.raises(TypeError) as error:
        emulator.linear(torch.zeros(1, 32), pack(cases.random_weight(8, 32, 32, dtype=torch.float32)))
    assert str(error.value) == "emulator: scales must be float16 or bfloat16; got torch.float32."
