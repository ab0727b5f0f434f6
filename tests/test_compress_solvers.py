"""Solvers and Hessians on small synthetic problems: order of methods, exactness, damping."""

from __future__ import annotations

import warnings

import pytest
import torch

from marlin.compress.hessian import DampingWarning, HessianSum, factor, output_error
from marlin.compress.recipe import METHODS, LayerRecipe
from marlin.compress.solvers import clip_scales, solve
from marlin.formats import CompressedWeight, DenseInt4Weight, is_24

N, K, TOKENS = 64, 128, 2048


def problem(seed: int = 0, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, k] and the second moments of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(TOKENS, k // 4, generator=generator) @ torch.randn(k // 4, k, generator=generator)
    noise = torch.randn(TOKENS, k, generator=generator)
    inputs = (factors / (k // 4) ** 0.5 + 0.5 * noise) * (3 * torch.rand(k, generator=generator)).exp()
    hessian = HessianSum(k)
    hessian.add(inputs)
    return torch.randn(N, k, generator=generator), hessian.mean("layer")


def error_of(kind: str, method: str, weight: torch.Tensor, hessian: torch.Tensor, group_size: int = 32) -> float:
    recipe = LayerRecipe(kind=kind, method=method, group_size=group_size, order="natural")
    solution = solve(weight, recipe, group_size, hessian, factor(hessian, recipe.damping))
    return output_error(weight, solution.dense, hessian)


@pytest.mark.parametrize("kind", ["w4a16_sp24", "sp24"])
def test_solve_output_error_follows_the_order_of_methods(kind: str) -> None:
    weight, hessian = problem()
    sweep, wanda, magnitude = (error_of(kind, m, weight, hessian) for m in ("sparsegpt", "wanda", "magnitude"))
    assert sweep < 0.8 * wanda
    assert wanda < 0.8 * magnitude


def test_solve_joint_sweep_beats_rounding_after_the_sweep() -> None:
    weight, hessian = problem()
    joint = error_of("w4a16_sp24", "sparsegpt", weight, hessian)
    apart = error_of("w4a16_sp24", "sparsegpt_rtn", weight, hessian)
    float_only = error_of("sp24", "sparsegpt", weight, hessian)
    assert float_only < joint < apart


def test_solve_gptq_beats_rounding_to_nearest() -> None:
    weight, hessian = problem()
    assert error_of("w4a16_dense", "gptq", weight, hessian) < 0.8 * error_of("w4a16_dense", "rtn", weight, hessian)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("kind", "method"), [(k, m) for k in METHODS for m in METHODS[k] if k != "skip"])
def test_solve_dense_values_are_codes_times_scales(kind: str, method: str, group_size: int) -> None:
    weight, hessian = problem()
    recipe = LayerRecipe(kind=kind, method=method, group_size=group_size, order="natural")
    solution = solve(weight, recipe, group_size, hessian, factor(hessian, 0.01))
    canonical = solution.weight()
    if kind == "sp24":
        assert canonical is None
        assert solution.mask is not None and is_24(solution.mask)
        assert bool((solution.dense[~solution.mask] == 0).all())
        return
    expected = CompressedWeight if kind == "w4a16_sp24" else DenseInt4Weight
    assert isinstance(canonical, expected)
    assert canonical.scales.dtype == torch.float16
    assert torch.equal(canonical.to_dense(torch.float32), solution.dense)


def test_solve_gives_each_of_stacked_layers_what_it_gets_alone() -> None:
    weight, hessian = problem()
    used = factor(hessian, 0.01)
    whole = solve(weight, LayerRecipe(order="natural"), 32, hessian, used)
    alone = solve(weight[16:40], LayerRecipe(order="natural"), 32, hessian, used)
    part = whole.rows(16, 40)
    assert part.mask is not None and alone.mask is not None
    # Why not equal bits: matrix products of other shapes sum in another order.
    assert (part.mask == alone.mask).float().mean() > 0.99
    assert output_error(alone.dense, part.dense, hessian) < 1e-2


def test_sweep_without_correlation_equals_the_baseline() -> None:
    weight, _ = problem()
    identity = torch.eye(K)
    used = factor(identity, 0.0)
    pruned = solve(weight, LayerRecipe(kind="sp24"), 32, identity, used)
    magnitude = solve(weight, LayerRecipe(kind="sp24", method="magnitude"), 32)
    assert torch.equal(pruned.dense, magnitude.dense)
    for kind, swept, baseline in (("w4a16_sp24", "sparsegpt", "magnitude"), ("w4a16_dense", "gptq", "rtn")):
        a = solve(weight, LayerRecipe(kind=kind, method=swept, order="natural"), 32, identity, used)
        b = solve(weight, LayerRecipe(kind=kind, method=baseline), 32)
        assert torch.equal(a.dense, b.dense)


def test_sweep_zeroes_weights_of_columns_that_are_never_used() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    used = factor(hessian, 0.01)
    assert used.dead.nonzero().flatten().tolist() == [5]
    solution = solve(weight, LayerRecipe(kind="w4a16_dense", method="gptq", order="natural"), 32, hessian, used)
    assert bool((solution.dense[:, 5] == 0).all())
    assert bool(solution.dense[:, 4].any())


def test_clip_scales_are_float16_values_and_beat_the_range() -> None:
    columns = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    wide = clip_scales(columns, None, None, 0)
    searched = clip_scales(columns, None, None, 20)

    def error(scale: torch.Tensor) -> float:
        return float(((columns / scale).round().clamp(-8, 7) * scale - columns).square().sum())

    assert torch.equal(searched, searched.half().float())
    assert error(searched) < error(wide)


def test_clip_scales_ignore_pruned_entries() -> None:
    columns = torch.full((4, 1), 0.75)
    columns[0] = 1000.0
    mask = torch.tensor([[False], [True], [True], [False]])
    assert float(clip_scales(columns, mask, None, 0)) == pytest.approx(0.1, rel=1e-3)


def test_factor_is_the_upper_root_of_the_inverse() -> None:
    _, hessian = problem()
    used = factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(K)
    assert used.damping == 0.05
    assert torch.equal(used.upper, used.upper.triu())
    assert bool((used.diagonal > 0).all())
    assert torch.allclose(used.upper.T @ used.upper @ damped, torch.eye(K), atol=1e-4)


def test_factor_raises_damping_with_a_warning_when_the_hessian_is_singular() -> None:
    inputs = torch.randn(8, K, generator=torch.Generator().manual_seed(0))
    hessian = HessianSum(K)
    hessian.add(inputs)
    with pytest.warns(DampingWarning, match=r"^factor of layer: the Hessian is not positive definite with damping 0;"):
        used = factor(hessian.mean("layer"), 0.0)
    assert used.damping >= 1e-4
    assert bool(used.upper.isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factor(hessian.mean("layer"), 0.01).damping == 0.01


def test_factor_refuses_a_hessian_that_no_damping_mends() -> None:
    hessian = torch.eye(K)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(ValueError) as error:
        factor(hessian, 0.01, "model.layers.0.mlp.up_proj")
    assert str(error.value) == (
        "factor of model.layers.0.mlp.up_proj: the Hessian must be positive definite with damping up to 1; got a "
        "factorization that fails at damping 1. Use more calibration tokens, or method 'magnitude' or 'rtn' for this "
        "layer."
    )


def test_hessian_sum_streams_to_the_mean_of_outer_products() -> None:
    inputs = torch.randn(6, 10, 32, dtype=torch.float64)
    hessian = HessianSum(32)
    for part in inputs.split(2):
        hessian.add(part)
    rows = inputs.reshape(-1, 32)
    assert hessian.tokens == 60
    assert torch.allclose(hessian.mean("layer").double(), rows.T @ rows / 60, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hessian_sum_rejects_inputs_that_are_not_finite(bad: float) -> None:
    inputs = torch.randn(4, 32)
    inputs[1, 2] = bad
    hessian = HessianSum(32)
    hessian.add(inputs)
    with pytest.raises(ValueError, match=r"^hessian of q_proj: calibration inputs must be finite; got NaN or inf"):
        hessian.mean("q_proj")


def test_hessian_sum_rejects_a_layer_without_tokens() -> None:
    with pytest.raises(ValueError, match=r"^hessian of expert: calibration must reach the layer; got 0 tokens\."):
        HessianSum(32).mean("expert")
