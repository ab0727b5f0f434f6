"""What is replayed on a GPU is fit for it: no function changes an input, and results survive reused buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlin.compress import LayerRecipe, graphs, refine, solvers
from marlin.compress.hessian import factor
from marlin.compress.solvers import activation_order, solve
from marlin.formats import top2_mask
from tests.test_compress_solvers import problem


def solved(kind: str, group_size: int) -> solvers.Solution:
    weight, hessian = problem()
    recipe = LayerRecipe(kind=kind, group_size=group_size)
    order = activation_order(hessian, group_size)
    moments = hessian[order][:, order] if recipe.order == "activation" else hessian
    solution = solve(weight, recipe, group_size, hessian, factor(moments, 0.01))
    return refine.refine(solution, weight, hessian, 0.01, 2)


class Buffers:
    """In the place of `graphs.replayed`: inputs are copied in, and a call overwrites what the last one returned."""

    def __init__(self) -> None:
        self.outputs: dict[Any, tuple[torch.Tensor, ...]] = {}
        self.calls = 0

    def __call__(self, function: Any, *tensors: torch.Tensor | None, **static: Any) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        found = function(*inputs, **static)
        for given, used in zip(tensors, inputs, strict=True):
            assert given is None or (used is not None and torch.equal(given, used)), function
        key = (function, tuple(None if t is None else (t.shape, t.dtype) for t in tensors), tuple(static.items()))
        kept = self.outputs.setdefault(key, tuple(torch.empty_like(each) for each in found))
        for old, new in zip(kept, found, strict=True):
            old.copy_(new)
        return kept


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("kind", ["w4a16_sp24", "w4a16_dense", "sp24"])
def test_solutions_are_the_same_with_reused_buffers(
    kind: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, buffers = solved(kind, group_size), Buffers()
    for module in (solvers, refine):
        monkeypatch.setattr(module, "replayed", buffers)
    found = solved(kind, group_size)
    assert buffers.calls > 0
    for name in ("dense", "mask", "codes", "scales"):
        first, second = getattr(expected, name), getattr(found, name)
        assert (first is None and second is None) or torch.equal(first, second)


def test_replayed_calls_the_function_where_there_is_no_gpu() -> None:
    seen: list[Any] = []

    def function(first: torch.Tensor, second: torch.Tensor | None, factor: int) -> tuple[torch.Tensor, ...]:
        seen.append(first)
        return (first * factor,)

    tensor = torch.ones(3)
    assert torch.equal(graphs.replayed(function, tensor, None, factor=2)[0], tensor * 2)
    assert seen[0] is tensor
    graphs.release()


def test_sweep_keeps_the_two_that_the_mask_of_the_format_keeps() -> None:
    score = torch.randint(0, 3, (4, 500)).float()
    assert torch.equal(solvers._keep_two(score), top2_mask(score.T).T)


def test_sweep_refuses_what_is_not_finite() -> None:
    weight, hessian = problem()
    weight[3, 5] = torch.nan
    recipe = LayerRecipe(group_size=32, order="natural")
    with pytest.raises(ValueError, match=r"^sweep: weights and factor must be finite; got NaN or infinity\.$"):
        solve(weight, recipe, 32, hessian, factor(hessian, 0.01))
