"""INT4 groups: scales of groups, rounding to codes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin.formats import expand_scales, group_scales, num_groups, quantize, top2_mask

GROUPED = [(32, 6), (64, 3), (-1, 1)]


@pytest.mark.parametrize(("group_size", "groups"), GROUPED)
def test_num_groups_counts_dense_positions(group_size: int, groups: int):
    assert num_groups(192, group_size) == groups


def test_num_groups_refuses_an_unknown_group_size():
    with pytest.raises(ValueError) as error:
        num_groups(256, 16, "pack")
    assert str(error.value) == "pack: group_size must be one of (32, 64, 128, -1); got group_size=16."


def test_num_groups_refuses_k_that_is_no_multiple():
    with pytest.raises(ValueError) as error:
        num_groups(192, 128)
    assert str(error.value) == (
        "int4: K must be a multiple of group_size=128; got K=192. "
        "Use a smaller group_size, or -1 for one scale per row."
    )


@pytest.mark.parametrize(("group_size", "groups"), GROUPED)
def test_expand_scales_repeats_each_scale_over_its_group(group_size: int, groups: int):
    scales = torch.arange(2.0 * groups).view(2, groups)
    wide = expand_scales(scales, 192)
    width = 192 if group_size == -1 else group_size
    assert wide.shape == (2, 192)
    assert all(wide[n, k] == scales[n, k // width] for n in range(2) for k in range(192))


@given(st.floats(2.0**-100, 2.0**100), st.integers(-8, 7))
def test_quantize_gives_back_the_code_of_an_exact_product(scale: float, code: int):
    scales = torch.tensor([[scale]])
    weight = (scales * code).expand(1, 32)
    assert quantize(weight, scales).tolist() == [[code] * 32]


def test_quantize_rounds_to_nearest_with_ties_to_even_and_clips():
    values = [-100.0, -8.4, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.6, 7.4, 100.0]
    weight = torch.tensor([values + [0.0] * 21])
    codes = quantize(weight, torch.ones(1, 1))
    assert codes.dtype == torch.int8
    assert codes[0, : len(values)].tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 7, 7, 7]


def test_quantize_uses_the_scale_of_each_group():
    scales = torch.tensor([[1.0, 2.0], [4.0, 0.5]])
    codes = quantize(torch.full((2, 64), 2.0), scales)
    assert codes[:, [0, 31, 32, 63]].tolist() == [[2, 2, 1, 1], [0, 0, 4, 4]]


def test_quantize_gives_code_zero_where_weight_and_scale_are_zero():
    scales = torch.tensor([[0.0], [1.0]])
    assert not quantize(torch.zeros(2, 4096), scales).any()


@pytest.mark.parametrize("search_steps", [0, 8])
@pytest.mark.parametrize(("group_size", "groups"), GROUPED)
def test_group_scales_have_the_shape_of_groups_and_are_positive(group_size: int, groups: int, search_steps: int):
    weight = torch.randn(8, 192)
    weight[0] = 0
    scales = group_scales(weight, group_size, search_steps=search_steps)
    assert scales.shape == (8, groups) and scales.dtype == torch.float32
    assert bool((scales > 0).all()) and bool(scales.isfinite().all())


def test_group_scales_take_the_largest_magnitude_over_7_5():
    weight = torch.zeros(1, 64)
    weight[0, 3], weight[0, 40] = -7.5, 3.75
    assert group_scales(weight, 32).tolist() == [[1.0, 0.5]]


def test_group_scales_count_only_masked_entries():
    weight = torch.randn(4, 64)
    mask = top2_mask(-weight.abs())  # keeps the small ones
    assert torch.equal(group_scales(weight, 32, mask), group_scales(weight * mask, 32))
    assert bool((group_scales(weight, 32, mask) < group_scales(weight, 32)).all())


def test_group_scales_refuse_a_weight_that_is_not_finite():
    weight = torch.ones(1, 32)
    weight[0, 5] = torch.nan
    with pytest.raises(ValueError) as error:
        group_scales(weight, 32)
    assert str(error.value) == (
        "group_scales: weight must be finite; got NaN or infinity. Check the checkpoint that it came from."
    )


@given(st.integers(0, 2**31), st.sampled_from([4, 16]))
def test_group_scales_search_never_increases_the_squared_error(seed: int, steps: int):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) ** 3

    def error(scales: torch.Tensor) -> torch.Tensor:
        dense = quantize(weight, scales).float() * expand_scales(scales, 128)
        return (dense - weight).square().view(4, -1, 32).sum(-1)

    plain, searched = (error(group_scales(weight, 32, search_steps=n)) for n in (0, steps))
    assert bool((searched <= plain * (1 + 1e-5)).all())
    assert float(searched.sum()) < float(plain.sum())
