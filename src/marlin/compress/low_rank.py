"""Low-rank correction: what a thin product adds to a compressed weight so that the layer's outputs come nearest to the
wanted ones.

Owns the closed form, and its alternation with the refinement of codes and mask. With E the remaining error and H the
second moments of the inputs, up @ down of least tr((E - up down) H (E - up down)^T) has the first eigenvectors of
E H E^T for up, and down = up^T E (SLiM, arXiv 2410.09615, and LQER, arXiv 2402.02446, take the same error). Knows
nothing of layers and models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marlin.compress.hessian import damped
from marlin.compress.recipe import LayerRecipe
from marlin.compress.refine import refine
from marlin.compress.solvers import Solution
from marlin.formats import LowRank

ALTERNATIONS = 4
DTYPE = torch.float16


def best_low_rank(error: torch.Tensor, hessian: torch.Tensor | None, rank: int) -> LowRank:
    """The product of at most this rank that takes most of error's effect on the outputs away, float16.

    Shapes: error [N, K] fp32; hessian [K, K], or None: all inputs count alike.
    """
    n, k = error.shape
    rank = min(rank, n, k)
    exact = error.double()
    moments = torch.eye(k, dtype=exact.dtype, device=exact.device) if hessian is None else hessian.double()
    if n <= k:
        up = torch.linalg.eigh(exact @ moments @ exact.T).eigenvectors[:, -rank:]
        down = up.T @ exact
    else:
        # Why: the smaller of two equal problems. With H = L L^T, the right singular vectors of E L.
        lower = torch.linalg.cholesky(moments)
        half = exact @ lower
        right = torch.linalg.eigh(half.T @ half).eigenvectors[:, -rank:]
        up, down = half @ right, torch.linalg.solve_triangular(lower.T, right, upper=True).T
    # Why balanced: both factors then stay far from the ends of float16.
    balance = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-30)).sqrt().clamp(1e-6, 1e6)
    return LowRank((up / balance).to(DTYPE).contiguous(), (down * balance.unsqueeze(1)).to(DTYPE).contiguous())


def corrected(
    solution: Solution,
    target: torch.Tensor,
    hessian: torch.Tensor | None,
    rows: Sequence[int],
    recipe: LayerRecipe,
) -> tuple[Solution, list[LowRank]]:
    """(solution, the correction of each layer), the solution refined again for what the corrections leave over.

    Shapes: target [N, K], layers of so many `rows` each stacked along N; hessian [K, K]. recipe: low_rank, damping, and
    refine, where 0 leaves the solution as it is. No step raises the error: refinement keeps the corrections, and these
    are the best for the solution.
    """
    moments = None if hessian is None else damped(hessian, recipe.damping)
    goal = target.clone()
    if hessian is not None:
        goal[:, hessian.diagonal() <= 0] = 0
    for _ in range(ALTERNATIONS if recipe.refine and hessian is not None else 0):
        parts = _fit(solution, goal, moments, rows, recipe.low_rank)
        left = goal - torch.cat([part.to_dense() for part in parts])
        assert hessian is not None
        solution = refine(solution, left, hessian, recipe.damping, 1)
    return solution, _fit(solution, goal, moments, rows, recipe.low_rank)


def _fit(
    solution: Solution, target: torch.Tensor, moments: torch.Tensor | None, rows: Sequence[int], rank: int
) -> list[LowRank]:
    return [best_low_rank(error, moments, rank) for error in (target - solution.dense).split(list(rows))]
