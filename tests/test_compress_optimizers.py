"""The optimizers of a recovery."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marlin.compress.optimizers import STEP_RMS, Muon, Optimizers, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonal_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    given[1] *= 1e-6
    u, sizes, v = torch.linalg.svd(given.double(), full_matrices=False)
    inside = u.mT @ orthogonal(given).double() @ v.mT
    found = inside.diagonal(dim1=-2, dim2=-1)
    seen = sizes / sizes.norm(dim=-1, keepdim=True) > 0.01
    assert bool((found[seen] > 0.4).all()) and bool((found < 1.4).all()) and float(seen.float().mean()) > 0.9
    away = inside - torch.diag_embed(found)
    assert float(away.abs().max()) < 1e-2


def test_orthogonal_of_zeros_is_zero() -> None:
    assert not bool(orthogonal(torch.zeros(2, 4, 8)).any())


def test_muon_moves_as_far_as_its_rate_says_and_skips_what_has_no_gradient() -> None:
    first, second, other = (nn.Parameter(torch.zeros(32, 64)) for _ in range(3))
    for each, seed in ((first, 1), (second, 2)):
        each.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    Muon([first, second, other], lr=0.01).step()
    for each in (first, second):
        assert float(each.detach().square().mean().sqrt()) == pytest.approx(0.01 * STEP_RMS, rel=0.25)
    assert not torch.equal(first, second) and not bool(other.any())
    with pytest.raises(ValueError, match=r"^Muon: parameters must be matrices; got shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def run(optimizers: Optimizers, weight: nn.Parameter, bias: nn.Parameter, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    for _ in range(steps):
        act = torch.randn(32, 4, generator=generator)
        (nn.functional.linear(act, weight, bias) - act @ wanted.T).square().mean().backward()
        optimizers.step(0.05)
        assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("muon", [None, "weights"])
def test_optimizers_learn_and_go_on_from_their_moments(muon: str | None) -> None:
    def fresh() -> tuple[Optimizers, nn.Parameter, nn.Parameter]:
        weight, bias = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.ones(8))
        groups = {"weights": [weight], "rest": [bias], "none": []}
        return Optimizers.of(groups, {"weights": 1.0, "rest": 0.5, "none": 1.0}, muon), weight, bias

    whole, weight, bias = fresh()
    run(whole, weight, bias, 40, 0)
    begun, half, half_bias = fresh()
    run(begun, half, half_bias, 20, 0)
    again, second, second_bias = fresh()
    with torch.no_grad():
        second.copy_(half), second_bias.copy_(half_bias)
    again.put({name: value.clone() for name, value in begun.moments().items()})
    for optimizers, w, b in ((begun, half, half_bias), (again, second, second_bias)):
        run(optimizers, w, b, 20, 1)
    assert torch.equal(half, second) and torch.equal(half_bias, second_bias)
    wanted = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    assert float((weight - wanted).detach().norm() / wanted.norm()) < 0.6
    assert len(whole.parts) == (1 if muon is None else 2)
