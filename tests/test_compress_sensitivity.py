"""Sensitivity measured on a tiny model, and the mixed recipe chosen from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from marlin.compress import LayerRecipe, Options, Recipe, compress_model, preset
from marlin.compress.sensitivity import Choice, Unit, choose, for_bits, measure, mixed_recipe
from marlin.formats import Weight

transformers = pytest.importorskip("transformers")

VOCAB = 96
EXACT = Options(autocast="none")


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(seed: int, samples: int = 4) -> torch.Tensor:
    return torch.randint(0, VOCAB, (samples, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, Weight]:
    return compress_model(tiny(), tokens(0), preset("sp24-int4", 32), options=EXACT).weights


def log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


def test_measure_equals_the_divergence_of_plain_forward_passes(weights: dict[str, Weight]) -> None:
    model, ids = tiny(), tokens(1)
    units = {unit.name: unit for unit in measure(model, weights, ids, keep=1, options=EXACT)}
    dense = log_probs(model, ids)
    for name in ("model.layers.0.mlp", "model.layers.2.self_attn"):
        changed = tiny()
        for layer in units[name].layers:
            changed.get_submodule(layer).weight.data.copy_(weights[layer].to_dense(torch.float32))
        expected = float((dense.exp() * (dense - log_probs(changed, ids))).sum(-1).mean())
        assert units[name].divergence == pytest.approx(expected, rel=1e-3)


def test_measure_covers_every_layer_once_least_costly_first(weights: dict[str, Weight]) -> None:
    calls: list[tuple[int, int]] = []
    units = measure(tiny(), weights, tokens(1), options=EXACT, progress=lambda *count: calls.append(count))
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(weights)
    assert len(units) == 6
    assert [unit.cost for unit in units] == sorted(unit.cost for unit in units)
    assert all(unit.divergence > 0 for unit in units)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_choose_leaves_the_model_as_it_was(weights: dict[str, Weight]) -> None:
    model, untouched = tiny(), tiny()
    choose(model, weights, tokens(1), max_ratio=1.5, options=EXACT)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    assert not model.lm_head._forward_pre_hooks


def assembled_perplexity(choice: Choice, weights: dict[str, Weight], ids: torch.Tensor) -> float:
    """Of the model put together by hand from the choice: 2:4 weights as given, the rest rounded to nearest."""
    model = tiny()
    dense = compress_model(tiny(), tokens(0), preset("int4-rtn", 32), options=EXACT).weights
    for name in weights:
        kind = choice.recipe.layer(name).kind
        source = weights if kind == "w4a16_sp24" else dense
        model.get_submodule(name).weight.data.copy_(source[name].to_dense(torch.float32))
    picked = log_probs(model, ids)[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1))
    return math.exp(-float(picked.double().mean()))


def test_choose_reports_the_perplexity_of_what_it_chose(weights: dict[str, Weight]) -> None:
    ids = tokens(1)
    ratios = [1.001, 1.01, 1.03, 1.1, 10.0]
    choices = [choose(tiny(), weights, ids, max_ratio=r, options=EXACT) for r in ratios if _possible(weights, ids, r)]
    assert choices[-1].num_sparse == len(choices[-1].units)
    assert [c.num_sparse for c in choices] == sorted(c.num_sparse for c in choices)
    for choice in choices:
        assert choice.perplexity == pytest.approx(assembled_perplexity(choice, weights, ids), rel=1e-4)
        sparse = {layer for unit in choice.units[: choice.num_sparse] for layer in unit.layers}
        assert {name for name in weights if choice.recipe.layer(name).kind == "w4a16_sp24"} == sparse


def _possible(weights: dict[str, Weight], ids: torch.Tensor, ratio: float) -> bool:
    try:
        choose(tiny(), weights, ids, max_ratio=ratio, units=[], options=EXACT)
    except ValueError:
        return False
    return True


def test_choose_takes_nothing_when_every_unit_costs_too_much(weights: dict[str, Weight]) -> None:
    model, ids = tiny(), tokens(1)
    for _ in range(24):
        # What the model itself would say next, so that every change of it costs perplexity.
        ids = torch.cat((ids, log_probs(model, ids)[:, -1:].argmax(-1)), dim=1)
    units = [unit for unit in measure(model, weights, ids, options=EXACT) if unit.name.endswith("mlp")]
    opposite = {name: replace(weights[name], codes=(-4 * weights[name].codes).clamp(-8, 7)) for name in weights}
    choice = choose(model, opposite, ids, max_ratio=1.2, units=units, options=EXACT)
    assert choice.num_sparse == 0
    assert choice.recipe.rules == ()
    assert choice.perplexity <= 1.2 * choice.dense_perplexity


def test_choose_result_has_a_json_form_with_the_recipe(weights: dict[str, Weight]) -> None:
    choice = choose(tiny(), weights, tokens(1), max_ratio=3.0, options=EXACT)
    body = json.loads(choice.to_json())
    assert Recipe.from_json(json.dumps(body["recipe"])) == choice.recipe
    assert len(body["units"]) == 6 and body["num_sparse"] == choice.num_sparse


def test_mixed_recipe_keeps_group_sizes_and_skips_the_head(weights: dict[str, Weight]) -> None:
    name = "model.layers.1.mlp.up_proj"
    recipe = mixed_recipe([Unit("u", (name,), 1, 0.0)], weights, LayerRecipe(kind="w4a16_dense", group_size=64))
    assert recipe.layer(name) == LayerRecipe(kind="w4a16_sp24", group_size=32)
    assert recipe.layer("model.layers.0.mlp.up_proj").kind == "w4a16_dense"
    assert recipe.layer("lm_head").kind == "skip"


def test_choose_rejects_weights_without_24_layers() -> None:
    with pytest.raises(ValueError) as caught:
        choose(tiny(), {}, tokens(1))
    assert str(caught.value) == "sensitivity.choose: weights must hold 2:4 layers of this model; got 0 others."


def test_choose_rejects_a_bound_that_is_not_above_one(weights: dict[str, Weight]) -> None:
    with pytest.raises(ValueError) as caught:
        choose(tiny(), weights, tokens(1), max_ratio=1.0)
    assert str(caught.value) == "sensitivity.choose: max_ratio must be above 1; got max_ratio=1.0."


def test_for_bits_makes_as_few_units_sparse_as_the_budget_needs(weights: dict[str, Weight]) -> None:
    units = measure(tiny(), weights, tokens(1), options=EXACT)
    dense = LayerRecipe(kind="w4a16_dense", group_size=32)
    total = sum(unit.num_weights for unit in units)
    sparse = []
    for bits in (4.5, 4.2, 3.8, 3.5):
        recipe = for_bits(units, weights, bits, dense)
        names = {name for name in weights if recipe.layer(name).kind == "w4a16_sp24"}
        chosen = [unit for unit in units if set(unit.layers) <= names]
        assert sum(len(unit.layers) for unit in chosen) == len(names) and chosen == units[: len(chosen)]
        share = sum(unit.num_weights for unit in chosen) / total
        assert 4.5 - share <= bits + 1e-9
        assert not chosen or 4.5 - (share - chosen[-1].num_weights / total) > bits
        sparse.append(len(chosen))
    assert sparse[0] == 0 and sparse == sorted(sparse) and sparse[-1] == len(units)


def test_for_bits_counts_the_group_size_that_a_layer_gets(weights: dict[str, Weight]) -> None:
    """in_features 64 and 96 take group 32 or 64 instead of 128, with more scales than asked for."""
    units = [Unit(name, (name,), 1, 0.0) for name in weights]
    with pytest.raises(ValueError) as caught:
        for_bits(units, weights, 3.4, LayerRecipe(kind="w4a16_dense", group_size=128))
    assert str(caught.value) == (
        "for_bits: bits must be at least 3.500; got 3.4. Raise the bits, or use a larger group size."
    )
    assert for_bits(units, weights, 4.5, LayerRecipe(kind="w4a16_dense", group_size=128)).rules == ()
    assert for_bits(units, weights, 4.2, LayerRecipe(kind="w4a16_dense", group_size=128)).rules != ()
