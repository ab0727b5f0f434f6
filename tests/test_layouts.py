"""Packed layouts: exact round trips, cuts without unpacking, padding that nobody sees, and words known by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin import ops
from marlin.formats import CompressedWeight, DenseInt4Weight, Weight
from marlin.formats.layouts import PackedWeight, pack, pack_scales, unpack, unpack_scales
from marlin.testing import cases, emulator, tolerance

SHAPES = [(8, 32), (64, 64), (72, 96), (200, 160), (200, 576), (128, 256)]
# (n, k, group_size): every group size with every shape that allows it.
EXTENTS = [(n, k, g) for n, k in SHAPES for g in cases.GROUP_SIZES if g == -1 or k % g == 0]


def _same(a: Weight, b: Weight) -> bool:
    if type(a) is not type(b) or a.group_size != b.group_size:
        return False
    same = torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and a.scales.dtype == b.scales.dtype
    return same and (not isinstance(a, CompressedWeight) or torch.equal(a.positions, b.positions))


def _cut(weight: Any, rows: slice = slice(None), columns: slice = slice(None)) -> Weight:
    """The canonical weight's rows and columns (on multiples of 4 and of the group)."""
    start, stop, _ = columns.indices(weight.k)
    per_code = weight.k // weight.codes.shape[1]
    changes = {"codes": weight.codes[rows, start // per_code : stop // per_code], "scales": weight.scales[rows]}
    if weight.group_size != -1:
        changes["scales"] = weight.scales[rows, start // weight.group_size : stop // weight.group_size]
    if isinstance(weight, CompressedWeight):
        changes["positions"] = weight.positions[rows, start // 4 : stop // 4]
    return replace(weight, **changes)


# --- round trips


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k", "group_size"), EXTENTS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_unpack_inverts_pack(kind: str, n: int, k: int, group_size: int, dtype: torch.dtype):
    weight = cases.random_weight(n, k, group_size, kind, dtype=dtype)
    packed = pack(weight).validate()
    assert (packed.kind, packed.n, packed.k, packed.group_size) == (kind, n, k, group_size)
    assert _same(unpack(packed), weight)


@given(
    st.sampled_from(cases.KINDS), st.integers(1, 33), st.integers(1, 9), st.sampled_from([32, -1]), st.integers(0, 999)
)
def test_unpack_inverts_pack_for_any_extent(kind: str, n8: int, k32: int, group_size: int, seed: int):
    weight = cases.random_weight(8 * n8, 32 * k32, group_size, kind, seed=seed)
    assert _same(unpack(pack(weight)), weight)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_pack_inverts_unpack_so_that_no_bit_is_free(kind: str):
    packed = pack(cases.random_weight(72, 96, 32, kind))
    again = pack(unpack(packed))
    assert torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)
    assert packed.meta is None or (again.meta is not None and torch.equal(again.meta, packed.meta))


def test_unpack_inverts_pack_where_kept_codes_are_zero():
    weight = cases.random_weight(64, 64, 32)
    weight = replace(weight, codes=torch.zeros_like(weight.codes))
    assert _same(unpack(pack(weight)), weight)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_pack_takes_views_and_leaves_its_input_alone(kind: str):
    wide = cases.random_weight(128, 256, 64, kind)
    view = _cut(wide, slice(8, 80), slice(64, 192))
    before = view.codes.clone()
    assert _same(unpack(pack(view)), view)
    assert torch.equal(view.codes, before)


@pytest.mark.parametrize("group_size", [32, -1])
def test_unpack_scales_inverts_pack_scales(group_size: int):
    scales = cases.random_weight(72, 96, group_size).scales
    packed = pack_scales(scales)
    assert packed.shape == (2, scales.shape[1], 64) and packed.is_contiguous()
    assert torch.equal(unpack_scales(packed, 72), scales)


def test_pack_rounds_scales_to_the_dtype_asked_for():
    weight = cases.random_weight(64, 64, 32, dtype=torch.float32)
    packed = pack(weight, torch.bfloat16)
    assert packed.scales.dtype == torch.bfloat16
    assert torch.equal(unpack(packed).scales, weight.scales.bfloat16())


@pytest.mark.parametrize(("kind", "bits"), [("w4a16_sp24", 3.125), ("w4a16_dense", 4.125)])
def test_packed_weights_take_the_bits_they_promise(kind: str, bits: float):
    packed = pack(cases.random_weight(256, 512, 128, kind))
    assert packed.nbytes * 8 / (256 * 512) == bits


def test_packing_2048_by_8192_takes_less_than_a_second_of_cpu_time():
    weight = cases.random_weight(2048, 8192, 128)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        pack(weight)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0


# --- words known by hand: row 122 = tile 1, warp 3, hi 1, g 2; column 157 = tile 2 of K, column 29 of 64.


def test_sparse_code_lies_in_the_documented_nibble():
    weight = cases.random_weight(192, 192, 64)
    codes = torch.zeros_like(weight.codes)
    # The second value kept of columns 156..159: k-step 0, half 1, quad 3.
    codes[122, 79] = 5
    packed = pack(replace(weight, codes=codes))
    expected = torch.full((3, 3, 256), 0x88888888 - (1 << 32), dtype=torch.int64)
    thread, step, nibble = 32 * 3 + 4 * 2 + 3, 0, 4 * 1 + 2 * 1 + 1
    expected[1, 2, 2 * thread + step] += 5 << (4 * nibble)
    assert torch.equal(packed.codes.long() & 0xFFFFFFFF, expected & 0xFFFFFFFF)


def test_sparse_metadata_lies_in_the_documented_nibble():
    weight = cases.random_weight(192, 192, 64)
    positions = torch.full_like(weight.positions, 0b0100)
    positions[122, 39] = 0b1110
    packed = pack(replace(weight, positions=positions))
    assert packed.meta is not None
    expected = torch.full((3, 3, 128), 0x44444444, dtype=torch.int64)
    word, nibble = 32 * 3 + 4 * 2 + 2 * 0 + 1, 3 + 4 * 1
    expected[1, 2, word] += 0b1010 << (4 * nibble)
    assert torch.equal(packed.meta.long() & 0xFFFFFFFF, expected)


def test_dense_code_lies_in_the_documented_nibble():
    weight = cases.random_weight(192, 192, 64, "w4a16_dense")
    codes = torch.zeros_like(weight.codes)
    codes[122, 157] = -8  # k-step 1, half 1, quad 2, second of the pair
    packed = pack(replace(weight, codes=codes))
    expected = torch.full((3, 3, 512), 0x88888888, dtype=torch.int64)
    thread, step, nibble = 32 * 3 + 4 * 2 + 2, 1, 4 * 1 + 2 * 1 + 1
    expected[1, 2, 4 * thread + step] -= 8 << (4 * nibble)
    assert torch.equal(packed.codes.long() & 0xFFFFFFFF, expected)


def test_scale_lies_at_the_documented_place():
    weight = cases.random_weight(192, 192, 64)
    scales = torch.zeros_like(weight.scales)
    scales[122, 2] = 1.5
    packed = pack(replace(weight, scales=scales))
    assert packed.scales.nonzero().tolist() == [[1, 2, 16 * 3 + 2 * 2 + 1]]
    assert float(packed.scales[1, 2, 53]) == 1.5


def test_padding_is_zero_codes_legal_metadata_and_zero_scales():
    packed = pack(cases.random_weight(8, 32, -1))
    assert packed.meta is not None
    tile = unpack(replace(packed, n=64, k=64))
    assert isinstance(tile, CompressedWeight)
    assert not tile.codes[8:].any() and not tile.codes[:, 16:].any() and not tile.scales[8:].any()
    assert bool((tile.positions[8:] == 0b0100).all()) and bool((tile.positions[:, 8:] == 0b0100).all())


# --- padding changes nothing


@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 32, 32), (72, 96, -1), (200, 160, 32), (8, 64, 64)])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_padding_bytes_are_invisible(kind: str, n: int, k: int, group_size: int):
    weight = cases.random_weight(n, k, group_size, kind)
    packed = pack(weight)
    filled = emulator.fill_padding(packed, 0xFF)
    assert not torch.equal(filled.codes, packed.codes)
    assert bool(filled.scales.isnan().any())
    assert _same(unpack(filled), weight)
    act, bias = cases.random_act(5, k), cases.random_act(1, n)[0]
    product = ops.linear(act, filled, bias)
    assert torch.equal(product, ops.linear(act, packed, bias))
    tolerance.check(product, act, weight, bias)
    assert torch.equal(emulator.linear(act, filled), emulator.linear(act, packed))


# --- cuts


@pytest.mark.parametrize(("start", "length"), [(0, 64), (64, 128), (128, 72), (192, 8), (0, 200)])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_narrow_n_is_the_slice_of_rows(kind: str, group_size: int, start: int, length: int):
    weight = cases.random_weight(200, 160, group_size, kind)
    part = pack(weight).narrow_n(start, length).validate()
    assert (part.n, part.k) == (length, 160)
    assert _same(unpack(part), _cut(weight, slice(start, start + length)))


@pytest.mark.parametrize(
    ("k", "group_size", "start", "length"),
    [
        *((576, 64, 0, 64), (576, 64, 64, 512), (160, 32, 64, 96), (160, 32, 128, 32), (512, 128, 128, 256)),
        *((160, -1, 64, 96), (576, -1, 512, 64), (160, -1, 0, 160)),
    ],
)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_narrow_k_is_the_slice_of_columns(kind: str, k: int, group_size: int, start: int, length: int):
    weight = cases.random_weight(72, k, group_size, kind)
    part = pack(weight).narrow_k(start, length).validate()
    assert (part.n, part.k) == (72, length)
    assert _same(unpack(part), _cut(weight, columns=slice(start, start + length)))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_narrow_along_both_axes_gives_partial_products_that_add_up(kind: str):
    weight = cases.random_weight(200, 576, 64, kind)
    packed, act = pack(weight), cases.random_act(3, 576)
    total = torch.zeros(3, 200, dtype=torch.float64)
    for n0, n1 in ((0, 128), (128, 200)):
        for k0, k1 in ((0, 256), (256, 576)):
            part = packed.narrow_n(n0, n1 - n0).narrow_k(k0, k1 - k0)
            total[:, n0:n1] += emulator.linear(act[:, k0:k1], part)
    torch.testing.assert_close(total, emulator.linear(act, packed), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("axis", "group_size", "start", "length", "unit", "extent"),
    [
        ("n", 64, 8, 64, 64, 200),
        ("n", 64, 0, 72, 64, 200),
        ("n", 64, 64, 256, 64, 200),
        ("n", 64, -64, 64, 64, 200),
        ("n", 64, 64, 0, 64, 200),
        ("k", 64, 32, 64, 64, 640),
        ("k", 128, 64, 128, 128, 640),
        ("k", 128, 0, 64, 128, 640),
        ("k", -1, 0, 32, 64, 640),
        ("k", -1, 0, 704, 64, 640),
    ],
)
def test_narrow_refuses_a_cut_off_the_boundaries(
    axis: str, group_size: int, start: int, length: int, unit: int, extent: int
):
    packed = pack(cases.random_weight(200, 640, group_size))
    with pytest.raises(ValueError) as error:
        getattr(packed, f"narrow_{axis}")(start, length)
    assert str(error.value) == (
        f"PackedWeight.narrow_{axis}: a cut along {axis.upper()} must lie on multiples of {unit} within {extent}; "
        f"got start={start}, length={length}. Cut the canonical weight instead (unpack, slice, pack)."
    )


# --- what is refused

_WORDS = torch.zeros(2, 2, 256, dtype=torch.int32)
FAULTS = {
    "kind": (
        {"kind": "w8a16"},
        ValueError,
        "PackedWeight: kind must be one of ('w4a16_sp24', 'w4a16_dense'); got 'w8a16'.",
    ),
    "n-multiple": ({"n": 70}, ValueError, "{op}: N must be a positive multiple of 8; got N=70."),
    "n-zero": ({"n": 0}, ValueError, "{op}: N must be a positive multiple of 8; got N=0."),
    "k-multiple": ({"k": 80}, ValueError, "{op}: K must be a positive multiple of 32; got K=80."),
    "group-size": (
        {"group_size": 8},
        ValueError,
        "{op}: group_size must be one of (32, 64, 128, -1); got group_size=8.",
    ),
    "group-size-multiple": (
        {"group_size": 64},
        ValueError,
        "{op}: K must be a multiple of group_size=64; got K=96. Use a smaller group_size, or -1 for one scale per row.",
    ),
    "codes-shape": (
        {"codes": _WORDS[:1]},
        ValueError,
        "{op}: codes must have shape (2, 2, 256); got (1, 2, 256).",
    ),
    "codes-dtype": ({"codes": _WORDS.float()}, TypeError, "{op}: codes must be int32; got torch.float32."),
    "meta-absent": (
        {"meta": None},
        ValueError,
        "{op}: meta must be present exactly for 2:4 weights; got meta=absent.",
    ),
    "meta-shape": ({"meta": _WORDS}, ValueError, "{op}: meta must have shape (2, 2, 128); got (2, 2, 256)."),
    "meta-dtype": (
        {"meta": _WORDS[..., :128].to(torch.int16)},
        TypeError,
        "{op}: meta must be int32; got torch.int16.",
    ),
    "scales-shape": (
        {"scales": torch.ones(2, 1, 64)},
        ValueError,
        "{op}: scales must have shape (2, 3, 64); got (2, 1, 64).",
    ),
    "scales-dtype": (
        {"scales": torch.ones(2, 3, 64, dtype=torch.float64)},
        TypeError,
        "{op}: scales must be float16, bfloat16 or float32; got torch.float64.",
    ),
}


@pytest.mark.parametrize(("change", "error", "text"), FAULTS.values(), ids=FAULTS)
def test_validate_refuses_each_violated_invariant(change: dict[str, Any], error: type[Exception], text: str):
    packed = pack(cases.random_weight(72, 96, 32))
    assert packed.validate() is packed
    with pytest.raises(error) as caught:
        replace(packed, **change).validate()
    assert str(caught.value) == text.format(op="PackedWeight[w4a16_sp24]")


def test_validate_refuses_metadata_of_a_dense_weight():
    packed = replace(pack(cases.random_weight(72, 96, 32, "w4a16_dense")), meta=_WORDS[..., :128])
    with pytest.raises(ValueError) as error:
        packed.validate()
    assert str(error.value) == (
        "PackedWeight[w4a16_dense]: meta must be present exactly for 2:4 weights; got meta=present."
    )


def test_unpack_refuses_illegal_metadata():
    packed = pack(cases.random_weight(64, 64, 32))
    assert packed.meta is not None
    packed.meta[0, 0, 77] = 0x44444445
    with pytest.raises(ValueError) as error:
        unpack(packed)
    assert str(error.value) == (
        "CompressedWeight: positions must be legal 2:4 nibbles (4, 8, 9, 12, 13, 14); got values [5]."
    )


def test_unpack_refuses_scales_that_are_not_finite():
    packed = pack(cases.random_weight(64, 64, 32))
    packed.scales[0, 0, 3] = torch.inf
    with pytest.raises(ValueError) as error:
        unpack(packed)
    assert str(error.value) == "CompressedWeight: scales must be finite; got NaN or infinity. Recompute them."


@pytest.mark.parametrize("factor", [2.0**24, 2.0**-30], ids=["overflow", "vanish"])
def test_pack_refuses_scales_that_do_not_fit(factor):
    weight = cases.random_weight(64, 64, 32, dtype=torch.float32)
    scales = torch.ones_like(weight.scales) * factor
    with pytest.raises(ValueError) as error:
        pack(replace(weight, scales=scales), torch.float16)
    assert str(error.value) == (
        "pack: scales must neither overflow nor vanish in torch.float16; "
        f"got torch.float32 in {factor:g}..{factor:g}. "
        "Pack with scale_dtype=torch.bfloat16, or rescale the weight."
    )


def test_pack_refuses_a_scale_dtype_that_is_no_float():
    with pytest.raises(TypeError) as error:
        pack(cases.random_weight(64, 64, 32), torch.int8)
    assert str(error.value) == "pack: scale_dtype must be float16, bfloat16 or float32; got torch.int8."


def test_pack_validates_the_weight():
    weight = DenseInt4Weight(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 2), 32)
    with pytest.raises(ValueError) as error:
        pack(weight)
    assert str(error.value) == "DenseInt4Weight: scales must have shape [N, K/group_size] = (8, 1); got (8, 2)."


def test_packed_tensors_are_contiguous_tile_by_tile():
    packed = pack(cases.random_weight(200, 160, 32))
    assert isinstance(packed, PackedWeight) and packed.meta is not None
    assert packed.codes.is_contiguous() and packed.meta.is_contiguous() and packed.scales.is_contiguous()
    assert (packed.codes.shape, packed.meta.shape, packed.scales.shape) == ((4, 3, 256), (4, 3, 128), (4, 5, 64))
