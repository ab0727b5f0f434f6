"""What improves a one-shot solution: order of the sweep, refinement, correction, solving in the order of calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from marlin.compress import LayerRecipe, Options, Recipe, compress_model, preset
from marlin.compress.blocks import BlockRunner, Call, adds_to_output, decoder_blocks
from marlin.compress.hessian import factor, output_error
from marlin.compress.recipe import HELPS, PLAIN
from marlin.compress.refine import refine
from marlin.compress.solvers import activation_order, solve
from marlin.formats import CompressedWeight, is_24
from tests.test_compress_solvers import K, problem
from tests.test_compress_walk import tiny, tokens

KINDS = ("w4a16_sp24", "w4a16_dense")


def test_activation_order_keeps_groups_and_fours_together() -> None:
    _, hessian = problem()
    order = activation_order(hessian, 32)
    assert order.sort().values.tolist() == list(range(K))
    fours = order.view(-1, 4)
    assert bool((fours.diff(dim=1) == 1).all()) and bool((fours[:, 0] % 4 == 0).all())
    groups = order.view(-1, 32) // 32
    assert bool((groups == groups[:, :1]).all())
    sums = hessian.diagonal()[order].view(-1, 32).sum(-1)
    assert bool((sums.diff() <= 0).all())


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_solve_in_activation_order_gives_weights_in_natural_order(kind: str, group_size: int) -> None:
    weight, hessian = problem()
    recipe = LayerRecipe(kind=kind, group_size=group_size, order="activation")
    order = activation_order(hessian, group_size)
    solution = solve(weight, recipe, group_size, hessian, factor(hessian[order][:, order], 0.01))
    canonical = solution.weight()
    assert canonical is not None
    assert torch.equal(canonical.to_dense(torch.float32), solution.dense)
    assert output_error(weight, solution.dense, hessian) < 0.6


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "gptq", "rtn"])
def test_refine_lowers_the_error_with_each_pass(method: str, group_size: int) -> None:
    weight, hessian = problem()
    kind = "w4a16_sp24" if method in ("sparsegpt", "magnitude") else "w4a16_dense"
    recipe = LayerRecipe(kind=kind, method=method, order="natural")
    solution = solve(weight, recipe, group_size, hessian, factor(hessian, 0.01))
    errors = [output_error(weight, solution.dense, hessian)]
    for passes in (1, 2, 4):
        better = refine(solution, weight, hessian, 0.0, passes)
        canonical = better.weight()
        assert canonical is not None
        assert torch.equal(canonical.to_dense(torch.float32), better.dense)
        if isinstance(canonical, CompressedWeight):
            assert is_24(canonical.mask())
        errors.append(output_error(weight, better.dense, hessian))
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.95 * errors[0]


def test_refine_leaves_floating_point_solutions_alone() -> None:
    weight, hessian = problem()
    solution = solve(weight, LayerRecipe(kind="sp24"), 32, hessian, factor(hessian, 0.01))
    assert refine(solution, weight, hessian, 0.01, 2) is solution


def final_error(recipe: LayerRecipe, sequential: bool) -> float:
    """Squared distance of the compressed model's last hidden states from the dense model's, on other tokens."""
    dense = tiny(4)
    model = copy.deepcopy(dense)
    options = Options(autocast="none", sequential=sequential)
    compress_model(model, tokens(samples=24), Recipe(default=recipe), options=options)
    other = tokens(seed=9)
    with torch.no_grad():
        a, b = (m.model(other).last_hidden_state for m in (dense, model))
    return float((a - b).square().mean())


def test_correcting_brings_the_models_output_nearer() -> None:
    plain = final_error(LayerRecipe(group_size=32, **PLAIN), sequential=False)
    corrected = final_error(LayerRecipe(group_size=32, **{**PLAIN, "correct": 0.5}), sequential=True)
    assert corrected < 0.95 * plain


def test_sequential_calibrates_on_the_compressed_layers_of_the_same_block() -> None:
    found: dict[bool, Any] = {}
    for sequential in (False, True):
        options = Options(autocast="none", sequential=sequential)
        found[sequential] = compress_model(
            tiny(1), tokens(), Recipe(default=LayerRecipe(group_size=32, **PLAIN)), options=options
        )
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(found[False].weights[first].codes, found[True].weights[first].codes)
    last = "model.layers.0.mlp.down_proj"
    assert not torch.equal(found[False].weights[last].codes, found[True].weights[last].codes)
    assert [row.name for row in found[True].report] == [row.name for row in found[False].report]


def test_adds_to_output_tells_the_last_layer_from_the_others() -> None:
    model = tiny(1)
    _, blocks = decoder_blocks(model)
    run = BlockRunner(blocks[0], torch.device("cpu"), None)
    hidden = torch.randn(1, 8, 64)
    position = model.model.rotary_emb(hidden, torch.arange(8).unsqueeze(0))
    call = Call((), {"position_embeddings": position})
    layers = {name: module for name, module in blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}
    adds = {name for name, layer in layers.items() if adds_to_output(run, layer, hidden, call)}
    assert adds == {"mlp.down_proj"}


def test_options_of_a_solver_are_part_of_the_recipe_and_checked() -> None:
    recipe = Recipe(default=LayerRecipe(order="activation", refine=2, correct=0.5))
    assert Recipe.from_json(recipe.to_json()) == recipe
    for field, value, text in (
        ("order", "random", "order must be one of ('natural', 'activation'); got 'random'."),
        ("correct", 1.5, "correct must lie in 0..1; got correct=1.5."),
        ("refine", -1, "refine must be at least 0; got refine=-1."),
    ):
        with pytest.raises(ValueError) as caught:
            LayerRecipe(**{field: value})
        assert str(caught.value) == f"LayerRecipe: {text}"
    assert LayerRecipe(kind="w4a16_dense", method="rtn", refine=1).needs_hessian


def test_layer_recipe_takes_what_helps_for_sweeps_that_round_and_nothing_for_other_methods() -> None:
    for recipe in (
        LayerRecipe(),
        LayerRecipe(kind="w4a16_dense"),
        LayerRecipe(method="magnitude").with_method("sparsegpt"),
    ):
        assert {name: getattr(recipe, name) for name in HELPS} == HELPS
    plain = [LayerRecipe(kind="sp24"), LayerRecipe(method="wanda"), LayerRecipe(kind="w4a16_dense", method="rtn")]
    for recipe in (*plain, LayerRecipe().with_method("magnitude"), LayerRecipe(kind="skip")):
        assert {name: getattr(recipe, name) for name in PLAIN} == PLAIN
    assert LayerRecipe(refine=0, correct=0.0).order == "activation"
    fast = preset("sp24-int4-fast").default
    assert (fast.order, fast.correct, fast.refine) == ("activation", 0.0, 3)


def test_compress_model_solves_in_the_order_of_calls_where_the_recipe_corrects() -> None:
    def codes(sequential: bool | None, correct: float) -> torch.Tensor:
        options = Options(autocast="none", sequential=sequential)
        recipe = Recipe(default=LayerRecipe(group_size=32, correct=correct))
        return compress_model(tiny(1), tokens(), recipe, options=options).weights["model.layers.0.mlp.down_proj"].codes

    assert torch.equal(codes(None, 0.5), codes(True, 0.5)) and not torch.equal(codes(None, 0.5), codes(False, 0.5))
    assert torch.equal(codes(None, 0.0), codes(False, 0.0))
