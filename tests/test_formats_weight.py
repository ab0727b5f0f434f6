"""The canonical weights: invariants are checked by name, dense values are exact, `from_dense` is an exact inverse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, top2_mask
from marlin.testing import cases, oracle

KINDS = {"w4a16_sp24": CompressedWeight, "w4a16_dense": DenseInt4Weight}
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def _weight(kind: str = "w4a16_sp24", n: int = 8, k: int = 64, group_size: int = 32, **kwargs: Any) -> Any:
    return cases.random_weight(n, k, group_size, kind, **kwargs)


def _same(a: Weight, b: Weight) -> bool:
    if type(a) is not type(b) or a.group_size != b.group_size:
        return False
    fields = ("codes", "positions", "scales") if isinstance(a, CompressedWeight) else ("codes", "scales")
    pairs = [(getattr(a, field), getattr(b, field)) for field in fields]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# --- values


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_is_the_oracles_value_rounded_once(kind: str, dtype: torch.dtype, group_size: int):
    weight = _weight(kind, 24, 256, group_size, dtype=dtype).validate()
    exact = oracle.dequantize(weight)
    for target in (torch.float64, *FLOATS):
        if target == torch.float64 and dtype == torch.float32:
            continue  # to_dense computes in fp32
        assert torch.equal(weight.to_dense(target), exact.to(target))
    assert weight.to_dense().dtype == dtype


def test_to_dense_of_a_hand_written_weight():
    codes = torch.tensor([[1, -8, 7, 0] + [0] * 12] * 8, dtype=torch.int8)
    positions = torch.tensor([[0b1101, 0b1000] + [0b0100] * 6] * 8, dtype=torch.uint8)
    weight = CompressedWeight(codes, positions, torch.full((8, 1), 0.5), 32).validate()
    assert weight.to_dense()[3, :12].tolist() == [0, 0.5, 0, -4, 3.5, 0, 0, 0, 0, 0, 0, 0]
    assert weight.mask()[3, :8].tolist() == [False, True, False, True, True, False, True, False]
    assert weight.dense_codes()[3, :8].tolist() == [0, 1, 0, -8, 7, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_extents_are_dense_extents(kind: str):
    weight = _weight(kind, 24, 96, 32)
    assert (weight.n, weight.k, weight.kind) == (24, 96, kind)
    assert weight.dense_codes().shape == (24, 96)


# --- from_dense


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_takes_a_fake_quantized_weight_apart(kind: str, dtype: torch.dtype, group_size: int):
    weight = _weight(kind, 16, 192, group_size, dtype=dtype)
    if isinstance(weight, CompressedWeight):
        again = CompressedWeight.from_dense(weight.to_dense(), weight.scales, group_size, weight.mask())
    else:
        again = DenseInt4Weight.from_dense(weight.to_dense(), weight.scales, group_size)
    assert _same(again, weight)


@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.integers(0, 2**31),
    st.integers(-12, 8),
)
def test_from_dense_of_any_weight_dtype_and_scale_dtype(
    kind: str, dtype: torch.dtype, scale_dtype: torch.dtype, seed: int, exponent: int
):
    weight = _weight(kind, seed=seed, dtype=scale_dtype)
    weight = replace(weight, scales=weight.scales * 2.0**exponent)
    dense = weight.to_dense(dtype)
    again = (
        CompressedWeight.from_dense(dense, weight.scales, 32, weight.mask())
        if isinstance(weight, CompressedWeight)
        else DenseInt4Weight.from_dense(dense, weight.scales, 32)
    )
    assert _same(again, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 2.0**-24), (torch.float16, 5 * 2.0**-24), (torch.float32, 2.0**-120), (torch.bfloat16, 2.0**-120)],
    ids=["fp16-smallest", "fp16-denormal", "fp32-tiny", "bf16-tiny"],
)
def test_from_dense_is_exact_for_tiny_scales(kind: str, dtype: torch.dtype, scale: float):
    weight = _weight(kind, dtype=dtype)
    weight = replace(weight, scales=torch.full_like(weight.scales, scale))
    dense = weight.to_dense()
    assert bool((dense != 0).any())
    again = (
        CompressedWeight.from_dense(dense, weight.scales, 32, weight.mask())
        if isinstance(weight, CompressedWeight)
        else DenseInt4Weight.from_dense(dense, weight.scales, 32)
    )
    assert _same(again, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_is_exact_where_every_code_is_minus_eight(kind: str):
    weight = _weight(kind)
    weight = replace(weight, codes=torch.full_like(weight.codes, -8))
    assert _same(KINDS[kind].from_dense(weight.to_dense(), weight.scales, 32), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_is_exact_for_negative_scales(kind: str):
    weight = _weight(kind)
    codes = torch.where(weight.codes == 0, 1, weight.codes)
    weight = replace(weight, codes=codes, scales=-weight.scales)
    assert _same(KINDS[kind].from_dense(weight.to_dense(), weight.scales, 32), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_takes_groups_of_zeros_with_scale_zero(kind: str):
    weight = _weight(kind)
    dense, scales = weight.to_dense(), weight.scales.clone()
    scales[2, 1] = 0
    dense[2, 32:] = 0
    again = KINDS[kind].from_dense(dense, scales, 32)
    assert torch.equal(again.to_dense(), dense)
    assert not again.dense_codes()[2, 32:].any()


def test_from_dense_keeps_zeros_that_the_mask_keeps():
    mask = torch.zeros(8, 32, dtype=torch.bool)
    mask[:, 2::4] = mask[:, 3::4] = True
    weight = CompressedWeight.from_dense(torch.zeros(8, 32), torch.ones(8, 1), 32, mask)
    assert torch.equal(weight.mask(), mask)
    assert not weight.codes.any()


def test_from_dense_without_a_mask_fills_groups_up_from_the_lowest_columns():
    dense = torch.zeros(8, 32)
    dense[:, 3], dense[:, 6], dense[:, 7] = 1.0, 2.0, 3.0
    weight = CompressedWeight.from_dense(dense, torch.ones(8, 1), 32)
    assert weight.mask()[0, :12].tolist() == [
        *(True, False, False, True),
        *(False, False, True, True),
        *(True, True, False, False),
    ]
    assert torch.equal(weight.to_dense(), dense)


def test_from_dense_drops_what_the_mask_does_not_keep():
    dense = torch.randint(-8, 8, (8, 64)).float()
    mask = top2_mask(dense.abs())
    weight = CompressedWeight.from_dense(dense, torch.ones(8, 2), 32, mask)
    assert torch.equal(weight.to_dense(), dense * mask)


def test_from_codes_gathers_at_the_mask():
    dense_codes = torch.randint(-8, 8, (8, 64), dtype=torch.int8)
    mask = top2_mask(dense_codes.abs())
    weight = CompressedWeight.from_codes(dense_codes, mask, torch.ones(8, 2), 32)
    assert torch.equal(weight.dense_codes(), dense_codes * mask)
    assert torch.equal(weight.mask(), mask)


# --- from_dense: what is refused


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_refuses_a_value_between_codes(kind: str):
    dense = torch.zeros(8, 64)
    dense[5, 40] = 1.5
    with pytest.raises(ValueError) as error:
        KINDS[kind].from_dense(dense, torch.ones(8, 2), 32)
    assert str(error.value) == (
        f"{KINDS[kind].__name__}.from_dense: weight must already be fake-quantized with these scales (code * scale, "
        "code in -8..7); got weight[5, 40]=1.5, nearest 2.0. Quantize it first: marlin.compress, or "
        "marlin.SparseLinear.from_dense(..., exact=False)."
    )


@pytest.mark.parametrize("ulps", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_refuses_a_value_one_ulp_off(kind: str, dtype: torch.dtype, ulps: int):
    weight = _weight(kind, dtype=dtype)
    dense = weight.to_dense()
    row, column = (dense != 0).nonzero()[7].tolist()
    dense.view(torch.int16)[row, column] += ulps
    with pytest.raises(ValueError, match=rf"got weight\[{row}, {column}\]="):
        KINDS[kind].from_dense(dense, weight.scales, 32)


def test_from_dense_refuses_a_denormal_between_codes():
    dense = torch.zeros(8, 32, dtype=torch.float16)
    dense[0, 0] = 3 * 2.0**-24
    with pytest.raises(ValueError, match=r"weight\[0, 0\]=1\.78\d+e-07, nearest 2\.38\d+e-07"):
        DenseInt4Weight.from_dense(dense, torch.full((8, 1), 2.0**-23, dtype=torch.float16), 32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_refuses_a_code_out_of_range(kind: str, dtype: torch.dtype):
    dense = torch.zeros(8, 64, dtype=dtype)
    dense[0, 0] = 8.0
    with pytest.raises(ValueError, match=r"weight\[0, 0\]=8\.0, nearest 7\.0"):
        KINDS[kind].from_dense(dense, torch.ones(8, 2), 32)


def test_from_dense_refuses_three_of_four():
    dense = torch.zeros(8, 64)
    dense[0, :3] = 1.0
    with pytest.raises(ValueError) as error:
        CompressedWeight.from_dense(dense, torch.ones(8, 2), 32)
    assert str(error.value) == (
        "CompressedWeight.from_dense: weight must have at most 2 non-zeros in every 4 along K; got 3. "
        "Prune it first (marlin.compress), or pass the mask to apply."
    )


@pytest.mark.parametrize(
    "mask",
    [torch.ones(8, 64, dtype=torch.bool), torch.ones(8, 32, dtype=torch.bool), torch.ones(8, 64)],
    ids=["four-of-four", "shape", "dtype"],
)
def test_from_dense_refuses_a_mask_that_is_not_24(mask: torch.Tensor):
    with pytest.raises(ValueError) as error:
        CompressedWeight.from_dense(torch.zeros(8, 64), torch.ones(8, 2), 32, mask)
    assert str(error.value) == (
        "CompressedWeight.from_dense: mask must be bool [N, K] that keeps exactly 2 of every 4 along K; "
        f"got {mask.dtype} {tuple(mask.shape)}. Build it with marlin.formats.top2_mask."
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_from_dense_refuses_a_weight_that_is_not_finite(kind: str, bad: float):
    dense = torch.zeros(8, 64)
    dense[1, 1] = bad
    with pytest.raises(ValueError) as error:
        KINDS[kind].from_dense(dense, torch.ones(8, 2), 32)
    assert str(error.value) == f"{KINDS[kind].__name__}.from_dense: weight must be finite; got NaN or infinity."


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_refuses_other_than_two_dimensions(kind: str):
    with pytest.raises(ValueError) as error:
        KINDS[kind].from_dense(torch.zeros(2, 8, 64), torch.ones(8, 2), 32)
    assert str(error.value) == f"{KINDS[kind].__name__}.from_dense: weight must have 2 dimensions; got (2, 8, 64)."


# --- validate: every branch, with its text. {name} is the class.

_ILLEGAL = torch.full((8, 16), 0b0100, dtype=torch.uint8)
_ILLEGAL[0, 0], _ILLEGAL[3, 3] = 0b0101, 0b0001
_BAD_SCALES = torch.full((8, 2), torch.nan)

BOTH = {
    "codes-dtype": (
        {"codes": torch.zeros(8, 32, dtype=torch.int32)},
        TypeError,
        "{name}: codes must be int8; got torch.int32.",
    ),
    "codes-dimensions": (
        {"codes": torch.zeros(256, dtype=torch.int8)},
        ValueError,
        "{name}: codes must have 2 dimensions; got (256,).",
    ),
    "codes-above": (
        {"codes": torch.full((8, 32), 8, dtype=torch.int8)},
        ValueError,
        "{name}: codes must lie in -8..7; got 8..8.",
    ),
    "codes-below": (
        {"codes": torch.full((8, 32), -9, dtype=torch.int8)},
        ValueError,
        "{name}: codes must lie in -8..7; got -9..-9.",
    ),
    "n-empty": (
        {"codes": torch.zeros(0, 32, dtype=torch.int8)},
        ValueError,
        "{name}: N must be a positive multiple of 8; got N=0. Pad the rows.",
    ),
    "n-multiple": (
        {"codes": torch.zeros(12, 32, dtype=torch.int8)},
        ValueError,
        "{name}: N must be a positive multiple of 8; got N=12. Pad the rows.",
    ),
    "group-size": (
        {"group_size": 48},
        ValueError,
        "{name}: group_size must be one of (32, 64, 128, -1); got group_size=48.",
    ),
    "group-size-multiple": (
        {"group_size": 128},
        ValueError,
        "{name}: K must be a multiple of group_size=128; got K=64. Use a smaller group_size, or -1 for one scale per "
        "row.",
    ),
    "scales-dtype": (
        {"scales": torch.ones(8, 2, dtype=torch.float64)},
        TypeError,
        "{name}: scales must be float16, bfloat16 or float32; got torch.float64.",
    ),
    "scales-shape": (
        {"scales": torch.ones(2, 8)},
        ValueError,
        "{name}: scales must have shape [N, K/group_size] = (8, 2); got (2, 8).",
    ),
    "scales-finite": (
        {"scales": _BAD_SCALES},
        ValueError,
        "{name}: scales must be finite; got NaN or infinity. Recompute them.",
    ),
    "scales-overflow": (
        {"scales": torch.full((8, 2), 1e6).half()},
        ValueError,
        "{name}: scales must be finite; got NaN or infinity. Recompute them.",
    ),
    "devices": (
        {"scales": torch.ones(8, 2, device="meta")},
        ValueError,
        "{name}: all tensors must be on one device; got cpu, meta.",
    ),
}
SPARSE_ONLY = {
    "k-multiple": (
        {"codes": torch.zeros(8, 24, dtype=torch.int8)},
        ValueError,
        "{name}: K must be a positive multiple of 32; got K=48. Pad the columns.",
    ),
    "k-empty": (
        {"codes": torch.zeros(8, 0, dtype=torch.int8)},
        ValueError,
        "{name}: K must be a positive multiple of 32; got K=0. Pad the columns.",
    ),
    "positions-dtype": (
        {"positions": torch.full((8, 16), 4, dtype=torch.int8)},
        TypeError,
        "{name}: positions must be uint8; got torch.int8.",
    ),
    "positions-shape": (
        {"positions": torch.full((8, 8), 4, dtype=torch.uint8)},
        ValueError,
        "{name}: positions must have shape [N, K/4] = (8, 16); got (8, 8).",
    ),
    "positions-device": (
        {"positions": torch.zeros(8, 16, dtype=torch.uint8, device="meta")},
        ValueError,
        "{name}: all tensors must be on one device; got cpu, meta.",
    ),
    "positions-illegal": (
        {"positions": _ILLEGAL},
        ValueError,
        "{name}: positions must be legal 2:4 nibbles (4, 8, 9, 12, 13, 14); got values [1, 5].",
    ),
}


def _dense_variant(change: dict[str, Any]) -> dict[str, Any]:
    """The same fault in a dense weight, whose codes are twice as wide."""
    codes = change.get("codes")
    if codes is None or codes.ndim != 2:
        return change
    return {**change, "codes": codes.repeat(1, 2)}


def _faults() -> list[Any]:
    rows = [pytest.param("w4a16_sp24", *row, id=f"sp24-{name}") for name, row in {**BOTH, **SPARSE_ONLY}.items()]
    return rows + [
        pytest.param("w4a16_dense", _dense_variant(change), error, text, id=f"dense-{name}")
        for name, (change, error, text) in BOTH.items()
    ]


@pytest.mark.parametrize(("kind", "change", "error", "text"), _faults())
def test_validate_refuses_each_violated_invariant(kind: str, change: dict[str, Any], error: type[Exception], text: str):
    weight = _weight(kind, dtype=torch.float32)
    assert weight.validate() is weight
    with pytest.raises(error) as caught:
        replace(weight, **change).validate()
    assert str(caught.value) == text.format(name=KINDS[kind].__name__)


def test_validate_refuses_a_dense_k_that_is_no_multiple_of_32():
    weight = DenseInt4Weight(torch.zeros(8, 48, dtype=torch.int8), torch.ones(8, 1), -1)
    with pytest.raises(ValueError) as error:
        weight.validate()
    assert str(error.value) == "DenseInt4Weight: K must be a positive multiple of 32; got K=48. Pad the columns."
