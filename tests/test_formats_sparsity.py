"""2:4 masks and position nibbles: what is legal, who wins a tie, and that both directions are exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin.formats import is_24, mask_from_positions, positions_from_mask, top2_mask
from marlin.formats.sparsity import LEGAL_NIBBLES, kept_columns, positions_are_legal

# The six ways to keep two of four, written out: nibble `i0 | i1 << 2` and the mask it stands for.
NIBBLES = {
    0b0100: (1, 1, 0, 0),
    0b1000: (1, 0, 1, 0),
    0b1100: (1, 0, 0, 1),
    0b1001: (0, 1, 1, 0),
    0b1101: (0, 1, 0, 1),
    0b1110: (0, 0, 1, 1),
}

small_groups = st.lists(st.integers(-3, 3), min_size=4, max_size=4)
masks = st.lists(st.lists(st.sampled_from(sorted(NIBBLES.values())), min_size=1, max_size=9), min_size=1, max_size=4)


def _mask(rows: list[list[tuple[int, ...]]]) -> torch.Tensor:
    width = min(len(row) for row in rows)
    return torch.tensor([list(itertools.chain(*row[:width])) for row in rows], dtype=torch.bool)


def test_legal_nibbles_are_the_six_ordered_pairs():
    assert sorted(LEGAL_NIBBLES) == sorted(NIBBLES)


@pytest.mark.parametrize(("nibble", "mask"), NIBBLES.items(), ids=[f"{n:04b}" for n in NIBBLES])
def test_position_nibble_stands_for_its_mask(nibble: int, mask: tuple[int, ...]):
    positions = torch.tensor([[nibble]], dtype=torch.uint8)
    assert mask_from_positions(positions).tolist() == [[bool(x) for x in mask]]
    assert positions_from_mask(torch.tensor([mask], dtype=torch.bool)).tolist() == [[nibble]]
    assert kept_columns(positions).tolist() == [[i for i, x in enumerate(mask) if x]]


def test_positions_are_legal_for_exactly_six_of_all_bytes():
    legal = [value for value in range(256) if positions_are_legal(torch.tensor([[value]], dtype=torch.uint8))]
    assert legal == sorted(NIBBLES)


def test_positions_are_legal_sees_one_illegal_among_many():
    positions = torch.full((8, 100), 0b0100, dtype=torch.uint8)
    assert positions_are_legal(positions)
    positions[7, 99] = 0b0001
    assert not positions_are_legal(positions)


@given(masks)
def test_positions_and_mask_are_inverse(rows: list[list[tuple[int, ...]]]):
    mask = _mask(rows)
    positions = positions_from_mask(mask)
    assert positions.dtype == torch.uint8 and positions.shape == (mask.shape[0], mask.shape[1] // 4)
    assert positions_are_legal(positions)
    assert torch.equal(mask_from_positions(positions), mask)
    assert torch.equal(kept_columns(positions), mask.nonzero()[:, 1].view(mask.shape[0], -1))


@given(st.lists(small_groups, min_size=1, max_size=8))
def test_top2_mask_keeps_the_two_largest_and_the_lower_index_on_ties(groups: list[list[int]]):
    mask = top2_mask(torch.tensor(groups))
    for group, kept in zip(groups, mask.tolist(), strict=True):
        winners = sorted(range(4), key=lambda i: (-group[i], i))[:2]
        assert kept == [i in winners for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64])
def test_top2_mask_is_the_same_for_every_dtype(dtype: torch.dtype):
    score = torch.randint(0, 3, (16, 64))
    assert torch.equal(top2_mask(score.to(dtype)), top2_mask(score))


def test_top2_mask_of_equal_scores_keeps_the_first_two():
    assert top2_mask(torch.zeros(2, 8)).tolist() == [[True, True, False, False] * 2] * 2


def test_top2_mask_ranks_infinities():
    score = torch.tensor([-torch.inf, torch.inf, 0.0, torch.inf])
    assert top2_mask(score).tolist() == [False, True, False, True]


def test_top2_mask_takes_leading_dimensions():
    score = torch.randn(3, 5, 12)
    mask = top2_mask(score)
    assert mask.shape == score.shape
    assert torch.equal(mask.view(15, 12), top2_mask(score.view(15, 12)))
    assert is_24(mask.view(15, 12))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0]], dtype=torch.bool), True),
        (torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool), False),
        (torch.tensor([[1, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool), False),
        (torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.bool), False),
        (torch.tensor([1, 1, 0, 0], dtype=torch.bool), False),
    ],
    ids=["two-of-four", "three-of-four", "one-of-four", "k-not-multiple-of-4", "one-dimension"],
)
def test_is_24_accepts_exactly_two_of_four(mask: torch.Tensor, expected: bool):
    assert is_24(mask) is expected


def test_top2_mask_refuses_k_that_is_not_a_multiple_of_4():
    with pytest.raises(ValueError) as error:
        top2_mask(torch.zeros(2, 6))
    assert str(error.value) == "top2_mask: K must be a multiple of 4; got K=6. Pad the weight."


def test_top2_mask_refuses_nan():
    with pytest.raises(ValueError) as error:
        top2_mask(torch.tensor([0.0, torch.nan, 1.0, 2.0]))
    assert str(error.value) == "top2_mask: scores must not be NaN; got NaN. Check the weight and the calibration data."


def test_positions_from_mask_refuses_a_mask_that_is_not_24():
    with pytest.raises(ValueError) as error:
        positions_from_mask(torch.ones(2, 8, dtype=torch.bool))
    assert str(error.value) == (
        "positions_from_mask: mask must keep exactly 2 of every 4 along K; got shape (2, 8) with another pattern. "
        "Build it with marlin.formats.top2_mask."
    )
