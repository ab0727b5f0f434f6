"""Recipes: rules, JSON and error texts; calibration windows."""

from __future__ import annotations

import json

import pytest
import torch

from marlin.compress import LayerRecipe, Recipe, calibration_windows, preset
from marlin.compress.recipe import PRESETS


def test_recipe_first_matching_rule_decides() -> None:
    down = LayerRecipe(kind="w4a16_dense", group_size=64)
    recipe = Recipe((("*.0.*", LayerRecipe(kind="skip")), ("*.down_proj", down)))
    assert recipe.layer("model.layers.0.mlp.down_proj").kind == "skip"
    assert recipe.layer("model.layers.1.mlp.down_proj") == down
    assert recipe.layer("model.layers.1.mlp.up_proj") == LayerRecipe()


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.3.mlp.gate", "model.layers.3.router"])
def test_recipe_skips_heads_embeddings_and_routers_by_default(name: str) -> None:
    assert Recipe().layer(name).kind == "skip"
    assert Recipe(((name, LayerRecipe()),)).layer(name).kind == "w4a16_sp24"


def test_recipe_compresses_gate_proj_by_default() -> None:
    assert Recipe().layer("model.layers.3.mlp.gate_proj").kind == "w4a16_sp24"


def test_layer_recipe_method_defaults_by_kind() -> None:
    methods = {kind: LayerRecipe(kind=kind).method for kind in ("w4a16_sp24", "w4a16_dense", "sp24", "skip")}
    assert methods == {"w4a16_sp24": "sparsegpt", "w4a16_dense": "gptq", "sp24": "sparsegpt", "skip": "none"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_recipe_json_round_trip_of_presets(name: str) -> None:
    recipe = preset(name, 64)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_recipe_json_round_trip_with_rules() -> None:
    rules = (("*.up_proj", LayerRecipe(group_size=-1, damping=0.05, search_steps=0, strict=True)),)
    recipe = Recipe(rules, LayerRecipe(kind="w4a16_dense", method="rtn"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["rules"][0]["pattern"] == "*.up_proj"


def test_recipe_from_json_fills_in_defaults() -> None:
    assert Recipe.from_json('{"rules": [{"pattern": "*", "kind": "w4a16_dense"}]}').layer("x").method == "gptq"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "Recipe.from_json: the recipe must be a JSON object; got list."),
        ('{"layers": []}', "Recipe.from_json: fields must be version, rules, default; got ['layers']."),
        ('{"version": 2}', "Recipe.from_json: version must be 1; got 2."),
        ('{"rules": {}}', "Recipe.from_json: rules must be a list; got dict."),
        ('{"rules": [{"kind": "skip"}]}', "Recipe.from_json: rules[0] must have a pattern; got {'kind': 'skip'}."),
        ('{"default": {"group_size": "64"}}', "Recipe.from_json: default.group_size must be int; got '64'."),
        ('{"default": {"group_size": true}}', "Recipe.from_json: default.group_size must be int; got True."),
        (
            '{"default": {"kind": "w8a8"}}',
            "LayerRecipe: kind must be one of ('w4a16_sp24', 'w4a16_dense', 'sp24', 'skip'); got 'w8a8'.",
        ),
        (
            '{"default": {"kind": "w4a16_dense", "method": "wanda"}}',
            "LayerRecipe: method must be one of ('gptq', 'rtn') for kind 'w4a16_dense'; got 'wanda'.",
        ),
        (
            '{"default": {"group_size": 48}}',
            "LayerRecipe: group_size must be one of (32, 64, 128, -1); got group_size=48.",
        ),
        ('{"default": {"damping": 2}}', "LayerRecipe: damping must lie in 0..1; got damping=2."),
    ],
)
def test_recipe_from_json_names_what_is_wrong(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_json(text)
    assert str(caught.value) == error


def test_recipe_from_json_rejects_text_that_is_not_json() -> None:
    with pytest.raises(ValueError, match=r"^Recipe.from_json: the recipe must be JSON; got Expecting value"):
        Recipe.from_json("nope")


def test_layer_recipe_takes_the_next_smaller_group_size_with_a_note() -> None:
    size, note = LayerRecipe(group_size=128).group_size_for("q", 64, 576)
    assert (size, note) == (64, "group_size 64 instead of 128: in_features is 576")
    assert LayerRecipe(group_size=128).group_size_for("q", 64, 1536) == (128, "")
    assert LayerRecipe(group_size=-1).group_size_for("q", 64, 96) == (-1, "")


@pytest.mark.parametrize(
    ("n", "k", "error"),
    [
        (12, 64, "compress q: out_features must be a multiple of 8; got 12. Give it kind 'skip' in the recipe."),
        (8, 48, "compress q: in_features must be a multiple of 32; got 48. Give it kind 'skip' in the recipe."),
        (
            8,
            96,
            "compress q: in_features must be a multiple of group_size=128; got 96. Choose a smaller group_size, or set "
            "strict to false.",
        ),
    ],
)
def test_layer_recipe_names_a_shape_that_no_format_takes(n: int, k: int, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        LayerRecipe(group_size=128, strict=True).group_size_for("q", n, k)
    assert str(caught.value) == error


def test_preset_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"^preset: name must be one of \('sp24-int4', 'int4'.*; got 'best'\."):
        preset("best")


def test_calibration_windows_begin_with_the_token_given() -> None:
    ids = torch.arange(1000)
    plain, found = (calibration_windows(ids, samples=5, length=100, seed=3, begin=begin) for begin in (None, 7))
    assert found[:, 0].tolist() == [7] * 5 and torch.equal(found[:, 1:], plain[:, 1:])
    assert torch.equal(ids, torch.arange(1000))


def test_calibration_windows_are_seeded_and_do_not_overlap() -> None:
    ids = torch.arange(1000)
    rows = calibration_windows(ids, samples=5, length=100, seed=3)
    assert torch.equal(rows, calibration_windows(ids, samples=5, length=100, seed=3))
    assert not torch.equal(rows, calibration_windows(ids, samples=5, length=100, seed=4))
    assert rows.shape == (5, 100)
    assert rows.flatten().unique().numel() == 500
    assert bool((rows[:, 0] % 100 == 0).all())


def test_calibration_windows_reject_a_short_text() -> None:
    with pytest.raises(ValueError) as caught:
        calibration_windows(torch.arange(250), samples=3, length=100)
    assert str(caught.value) == (
        "calibration_windows: the text must hold 3 windows of 100 tokens; got 250 tokens. Use more text, or fewer or "
        "shorter samples."
    )
