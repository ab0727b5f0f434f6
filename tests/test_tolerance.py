"""The tolerance passes what is honest, and fails every planted fault that averages would let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from marlin.formats import Weight
from marlin.formats.layouts import PackedWeight, pack
from marlin.testing import cases, emulator, oracle, tolerance

M, N, K, GROUP = 16, 512, 1024, 128
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def act() -> torch.Tensor:
    return cases.random_act(M, K)


@pytest.fixture(scope="module")
def weight() -> Weight:
    return cases.random_weight(N, K, GROUP)


def _averages_pass(out: torch.Tensor, ref: torch.Tensor) -> bool:
    """The two averages that are in common use as tolerances."""
    difference = (out.double() - ref).abs().mean() / ref.abs().mean()
    cosine = torch.nn.functional.cosine_similarity(out.double().flatten(), ref.flatten(), dim=0)
    return bool(difference < 0.002) and bool(cosine > 0.99)


# --- honest results pass


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_check_passes_rounded_weights_fp32_sums_and_one_rounding(kind: str, group_size: int, dtype: torch.dtype):
    weight = cases.random_weight(200, 2048, group_size, kind, dtype=dtype)
    act, bias = cases.random_act(256, 2048, dtype=dtype), cases.random_act(1, 200, dtype=dtype)[0]
    out = (act.float() @ weight.to_dense(dtype).float().T + bias.float()).to(dtype)
    tolerance.check(out, act, weight, bias)


@pytest.mark.parametrize("m", [1, 64])
def test_check_passes_fp32_sums_in_float32(m: int):
    weight = cases.random_weight(200, 4096, 128, dtype=torch.float32)
    act = cases.random_act(m, 4096, dtype=torch.float32)
    tolerance.check(act @ weight.to_dense().T, act, weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-6, 2.0**-20], ids=["subnormal", "almost-zero"])
def test_check_passes_subnormal_outputs(dtype: torch.dtype, scale: float):
    weight = cases.random_weight(64, 64, 32, dtype=torch.float32)
    act = cases.random_act(8, 64, dtype=torch.float32) * scale
    tolerance.check(oracle.linear(act, weight).to(dtype), act, weight)


def test_check_takes_leading_dimensions_and_bias(act: torch.Tensor, weight: Weight):
    bias = cases.random_act(1, N)[0]
    batched = act.view(2, 8, K)
    out = oracle.linear(batched, weight, bias).half()
    assert out.shape == (2, 8, N)
    tolerance.check(out, batched, weight, bias)
    with pytest.raises(AssertionError):
        tolerance.check(out, batched, weight)


def test_check_is_the_same_in_slices_of_m(monkeypatch: pytest.MonkeyPatch, weight: Weight):
    act = cases.random_act(37, K)
    out = oracle.linear(act, weight).half()
    out[36, 5] += 1
    out[2, 7] -= 2
    texts = []
    for entries in (1 << 24, 5 * K):
        monkeypatch.setattr(tolerance, "_CHUNK_ENTRIES", entries)
        with pytest.raises(AssertionError) as error:
            tolerance.check(out, act, weight)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith("out: 2 of 18944 entries outside the bound, in 2 of 37 rows and 2 of 512 columns;")


# --- planted faults fail


def _swap_two_nibbles(packed: PackedWeight) -> PackedWeight:
    word = int(packed.codes[3, 5, 17]) & 0xFFFFFFFF
    low, high = word & 15, word >> 28
    assert low != high
    word = word & 0x0FFFFFF0 | low << 28 | high
    packed.codes[3, 5, 17] = word - (1 << 32) if word >> 31 else word
    return packed


def _wrong_selector(packed: PackedWeight) -> PackedWeight:
    """One tile's k-steps take each other's metadata, as if both selectors were flipped."""
    assert packed.meta is not None
    quads = packed.meta[2, 3].view(32, 2, 2)
    packed.meta[2, 3] = quads.flip(1).reshape(-1)
    return packed


def _neighbours_metadata_word(packed: PackedWeight) -> PackedWeight:
    """Columns 0..15 of a k-step with the metadata of 16..31, in one tile."""
    assert packed.meta is not None
    packed.meta[2, 3] = packed.meta[2, 3].view(64, 2).flip(1).reshape(-1)
    return packed


def _wrong_group_scale(packed: PackedWeight) -> PackedWeight:
    packed.scales[4, 6] = packed.scales[4, 5].clone()
    return packed


def _swapped_scale_halves(packed: PackedWeight) -> PackedWeight:
    packed.scales[4, 6] = packed.scales[4, 6].view(32, 2).flip(1).reshape(-1)
    return packed


def _skipped_last_k16(packed: PackedWeight) -> PackedWeight:
    """One tile of 64 rows leaves out the last 16 columns: registers 2 and 3 of the last k-step, as code 0."""
    words = packed.codes[1, -1].view(128, 2)
    words[:, 1] = (words[:, 1] & 0x00FF00FF) | -0x77FF7800
    return packed


PACKED_FAULTS = [
    _swap_two_nibbles,
    _wrong_selector,
    _neighbours_metadata_word,
    _wrong_group_scale,
    _swapped_scale_halves,
    _skipped_last_k16,
]


def _copy(packed: PackedWeight) -> PackedWeight:
    assert packed.meta is not None
    return replace(packed, codes=packed.codes.clone(), meta=packed.meta.clone(), scales=packed.scales.clone())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("fault", PACKED_FAULTS, ids=lambda fault: fault.__name__[1:])
def test_check_fails_for_a_fault_in_packed_bytes(
    fault: Callable[[PackedWeight], PackedWeight], dtype: torch.dtype, act: torch.Tensor, weight: Weight
):
    packed = pack(weight)
    tolerance.check(emulator.linear(act, packed).to(dtype), act, weight)
    with pytest.raises(AssertionError, match=r"^out: \d+ of 8192 entries outside the bound"):
        tolerance.check(emulator.linear(act, fault(_copy(packed))).to(dtype), act, weight)


def test_skipped_last_k16_is_the_fault_it_claims_to_be(act: torch.Tensor, weight: Weight):
    packed = pack(weight)
    difference = emulator.operand(packed) != emulator.operand(_skipped_last_k16(_copy(packed)))
    rows, columns = difference.nonzero().T
    assert (int(rows.min()), int(rows.max())) == (64, 127)
    assert int(columns.min()) >= K - 16


def _zero_column(out: torch.Tensor) -> None:
    out[:, 300] = 0


def _zero_row_of_a_column_pair(out: torch.Tensor) -> None:
    out[7, 128:136] = 0


def _stale_entry(out: torch.Tensor) -> None:
    out[15, N - 1] = out[0, 0]


def _swapped_columns(out: torch.Tensor) -> None:
    out[:, [10, 11]] = out[:, [11, 10]]


def _poison_left_in_place(out: torch.Tensor) -> None:
    out[3, 4] = torch.nan


@pytest.mark.parametrize(
    "fault",
    [_zero_column, _zero_row_of_a_column_pair, _stale_entry, _swapped_columns, _poison_left_in_place],
    ids=lambda fault: fault.__name__[1:],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_check_fails_for_a_fault_in_the_output(
    fault: Callable[[torch.Tensor], None], dtype: torch.dtype, act: torch.Tensor, weight: Weight
):
    out = oracle.linear(act, weight).to(dtype)
    tolerance.check(out, act, weight)
    fault(out)
    with pytest.raises(AssertionError, match="outside the bound"):
        tolerance.check(out, act, weight)


def test_averages_pass_a_column_of_zeros_that_check_fails():
    act, weight = cases.random_act(16, 256), cases.random_weight(2048, 256, 128)
    ref = oracle.linear(act, weight)
    out = ref.half()
    out[:, 300] = 0
    assert _averages_pass(out, ref)
    with pytest.raises(AssertionError, match=r"in 16 of 16 rows and 1 of 2048 columns"):
        tolerance.check(out, act, weight)


# --- values that are not finite


def _constant(value: float, act_value: float = 1.0) -> tuple[torch.Tensor, Weight]:
    """act and weight whose product is 32 * value * act_value."""
    weight = cases.random_weight(8, 32, -1, "w4a16_dense", dtype=torch.float32)
    weight = replace(weight, codes=torch.ones_like(weight.codes), scales=torch.full_like(weight.scales, value))
    return torch.full((1, 32), act_value), weight


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_check_wants_the_same_non_finite_value_as_the_reference(bad: float):
    act, weight = _constant(1.0)
    act[0, 3] = bad
    same = torch.full((1, 8), bad)
    tolerance.check(same.half(), act, weight)
    for other in (0.0, torch.nan, torch.inf, -torch.inf):
        if str(other) != str(bad):
            with pytest.raises(AssertionError, match="8 of 8 entries"):
                tolerance.check(torch.full((1, 8), other).half(), act, weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_check_refuses_a_non_finite_output_where_the_reference_is_finite(bad: float):
    act, weight = _constant(1.0)
    with pytest.raises(AssertionError, match=r"\[0, 0\] out=(nan|inf) ref=32 "):
        tolerance.check(torch.full((1, 8), bad).half(), act, weight)


@pytest.mark.parametrize(
    ("ref", "out", "passes"),
    [
        (70000.0, torch.inf, True),
        (-70000.0, -torch.inf, True),
        (70000.0, -torch.inf, False),
        (70000.0, torch.nan, False),
        (70000.0, 65504.0, False),
        (65504.0, 65504.0, True),
        (65504.0, torch.inf, True),  # within the bound of 65520, which rounds to infinity
        (60000.0, torch.inf, False),
    ],
)
def test_check_lets_fp16_overflow_where_the_reference_does(ref: float, out: float, passes: bool):
    act, weight = _constant(ref / 32)
    result = torch.full((1, 8), out).half()
    if passes:
        tolerance.check(result, act, weight)
        return
    with pytest.raises(AssertionError, match="8 of 8 entries"):
        tolerance.check(result, act, weight)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 65520.0), (torch.bfloat16, 3.3961775292304e38)])
def test_overflow_limit_is_where_rounding_reaches_infinity(dtype: torch.dtype, limit: float):
    assert tolerance.overflow_limit(dtype) == pytest.approx(limit, rel=1e-12)
    at = torch.tensor(tolerance.overflow_limit(dtype), dtype=torch.float64)
    assert bool(at.to(dtype).isinf()) and bool((at * (1 - 1e-7)).to(dtype).isfinite())


# --- the message, and what is refused


def test_check_names_the_worst_entries_first():
    act, weight = _constant(1.0)
    out = torch.full((1, 8), 32.0, dtype=torch.float16)
    out[0, 2], out[0, 6] = 33.0, 40.0
    with pytest.raises(AssertionError) as error:
        tolerance.check(out, act, weight, name="m1-n8-k32")
    # u |ref| + 3 u sqrt(32), and half of the smallest subnormal
    bound = 2.0**-11 * (32 + 3 * 32**0.5) + 2.0**-25
    assert str(error.value) == (
        "m1-n8-k32: 2 of 8 entries outside the bound, in 1 of 1 rows and 2 of 8 columns; worst:\n"
        f"  [0, 6] out=40 ref=32 bound={bound:.3g}\n"
        f"  [0, 2] out=33 ref=32 bound={bound:.3g}"
    )


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bound_is_the_documented_formula(dtype: torch.dtype, factor: float):
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    ref, spread = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    expected = u * 2.0 + 6 * u / 2 * 3.0
    assert float(tolerance.bound(ref, spread, dtype, 4096)) == pytest.approx(expected, rel=1e-4)


def test_check_refuses_another_shape(act: torch.Tensor, weight: Weight):
    with pytest.raises(AssertionError) as error:
        tolerance.check(torch.zeros(M, N - 8), act, weight, name="narrow")
    assert str(error.value) == "narrow: shape must be (16, 512); got (16, 504)"


def test_check_refuses_an_output_dtype_without_a_bound(act: torch.Tensor, weight: Any):
    with pytest.raises(TypeError) as error:
        tolerance.check(torch.zeros(M, N, dtype=torch.float64), act, weight)
    assert str(error.value) == ("tolerance.check: out must be float16, bfloat16 or float32; got torch.float64.")


# --- the table of cases


def test_every_case_has_its_own_id_and_a_reason():
    ids = [case.id for case in cases.CASES]
    assert len(ids) == len(set(ids))
    assert all(case.reason for case in cases.CASES)
    assert "m16-n4096-k4096-g128-fp16-sp24" in ids


def test_cases_cover_every_m_and_combination_of_kind_dtype_and_group_size():
    assert {case.m for case in cases.CASES} >= set(cases.M_SWEEP)
    combinations = {(case.kind, case.dtype, case.group_size) for case in cases.CASES}
    assert len(combinations) == len(cases.KINDS) * len(cases.DTYPES) * len(cases.GROUP_SIZES)
    assert all(case.macs <= 1 << 24 for case in cases.cases(1 << 24))


@pytest.mark.parametrize("case", cases.cases(2 << 20), ids=lambda case: case.id)
def test_case_is_legal_and_its_oracle_is_within_the_tolerance(case: cases.Case):
    act, weight, bias = case.inputs()
    weight.validate()
    assert (act.dtype, weight.scales.dtype, weight.n, weight.k) == (case.dtype, case.dtype, case.n, case.k)
    tolerance.check(oracle.linear(act, weight, bias).to(case.dtype), act, weight, bias, name=case.id)
    again = case.inputs()
    assert torch.equal(again[0], act) and torch.equal(again[1].codes, weight.codes)
