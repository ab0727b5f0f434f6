"""Perplexity against hand computation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from marlin.evaluate import compare, perplexity, windows


class Bigram(nn.Module):
    """Predicts the next token from a fixed table; counts its calls."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_equals_the_hand_computation() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    model = Bigram(probabilities.log())
    ids = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1])
    # Windows (0 1 1 2) and (0 2 2 1); the step from one to the next is not predicted.
    factors = [0.25, 0.8, 0.1, 0.25, 0.4, 0.3]
    expected = math.exp(-sum(math.log(p) for p in factors) / len(factors))
    assert perplexity(model, ids, window=4, limit=None) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size() -> None:
    assert perplexity(Bigram(torch.zeros(7, 7)), torch.arange(7).repeat(4), window=8) == pytest.approx(7.0, rel=1e-6)


def test_perplexity_uses_the_first_windows_and_reports_progress() -> None:
    model, calls = Bigram(torch.zeros(10, 10)), []
    perplexity(model, torch.arange(10).repeat(5), window=8, limit=3, progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(torch.cat(model.seen).flatten(), torch.arange(10).repeat(5)[:24])


def test_perplexity_leaves_the_training_mode_as_it_was() -> None:
    model = Bigram(torch.zeros(4, 4)).train()
    perplexity(model, torch.zeros(8, dtype=torch.int64), window=4)
    assert model.training


def test_perplexity_rejects_a_model_that_gives_nan() -> None:
    with pytest.raises(ValueError) as caught:
        perplexity(Bigram(torch.full((4, 4), float("nan"))), torch.zeros(8, dtype=torch.int64), window=4)
    assert str(caught.value) == (
        "perplexity: the model must give finite log-likelihoods; got nan. Check the weights for NaN, or evaluate in "
        "float32."
    )


def test_windows_reject_a_short_text() -> None:
    with pytest.raises(ValueError) as caught:
        windows(torch.zeros(5, dtype=torch.int64), 8, None)
    assert str(caught.value) == (
        "evaluate.windows: the text must hold at least one window of 8 tokens; got 5 tokens. Use a longer text or a "
        "shorter window."
    )


def test_windows_reject_other_dtypes() -> None:
    with pytest.raises(TypeError) as caught:
        windows(torch.zeros(16, dtype=torch.int32), 8, None)
    assert str(caught.value) == "evaluate.windows: token_ids must be int64; got torch.int32. Pass tokenizer ids."


def test_compare_equals_the_hand_computation() -> None:
    own = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    other = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    ids = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1])
    found = compare(Bigram(own.log()), Bigram(other.log()), ids, window=4, limit=None)
    seen = [0, 1, 1, 0, 2, 2]  # Tokens that something is predicted from.
    rows = [sum(q * math.log(q / p) for p, q in zip(own[i].tolist(), other[i].tolist(), strict=True)) for i in seen]
    assert found.divergence == pytest.approx(sum(rows) / 6, rel=1e-5)
    assert found.agreement == pytest.approx(4 / 6) and found.tokens == 6
    assert found.perplexity == pytest.approx(perplexity(Bigram(own.log()), ids, window=4), rel=1e-6)
    assert found.dense_perplexity == pytest.approx(perplexity(Bigram(other.log()), ids, window=4), rel=1e-6)


def test_compare_finds_no_distance_of_a_model_from_itself_over_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin.evaluate.POSITIONS_AT_ONCE", 3)
    torch.manual_seed(0)
    model, calls = Bigram(torch.randn(9, 9)), []
    found = compare(model, model, torch.arange(9).repeat(4), window=8, limit=2, progress=lambda *a: calls.append(a))
    assert found.divergence < 1e-7 and found.agreement == 1 and found.tokens == 14 and calls == [(1, 2), (2, 2)]


def test_compare_rejects_another_vocabulary() -> None:
    with pytest.raises(ValueError) as caught:
        compare(Bigram(torch.zeros(4, 4)), Bigram(torch.zeros(4, 5)), torch.zeros(8, dtype=torch.int64), window=4)
    assert str(caught.value) == "compare: both models must have the same vocabulary; got 4 and 5 tokens."


def test_windows_begin_with_the_token_given_and_the_same_tokens_are_predicted() -> None:
    ids = torch.arange(100)
    found = windows(ids, 30, None, begin=7)
    assert found[:, 0].tolist() == [7, 7, 7] and torch.equal(found[:, 1:], windows(ids, 30, None)[:, 1:])
    assert torch.equal(ids, torch.arange(100))
