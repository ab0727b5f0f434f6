"""From a weight and the second moments of its inputs to mask, codes and scales.

Owns the methods named in `recipe.METHODS`: one sweep over the inverse Hessian's factor that prunes and rounds together
(SparseGPT, arXiv 2301.00774, and GPTQ, arXiv 2210.17323, in one pass), and the baselines magnitude, Wanda
(arXiv 2306.11695) and round-to-nearest. Knows nothing of models.

Rows are independent, so layers with the same inputs are stacked along N and solved at once. Inside, weights are
transposed ([K, N]): one column of the sweep is then contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin.compress.graphs import replayed
from marlin.compress.hessian import Factor
from marlin.compress.recipe import LayerRecipe
from marlin.errors import require
from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, expand_scales, quantize, top2_mask
from marlin.formats.int4 import QMAX, QMIN

SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
DEFAULT_BLOCK = 128


@dataclass(frozen=True)
class Solution:
    """dense: fp32 [N, K], exactly what is evaluated. mask: bool [N, K] or None (dense). codes int8 [N, K] and scales
    float16 [N, G] are None for floating-point kinds."""

    dense: torch.Tensor
    mask: torch.Tensor | None
    codes: torch.Tensor | None
    scales: torch.Tensor | None
    group_size: int

    def rows(self, start: int, stop: int) -> Solution:
        """The part of one of several stacked layers."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Solution(self.dense[start:stop], cut(self.mask), cut(self.codes), cut(self.scales), self.group_size)

    def weight(self) -> Weight | None:
        """The canonical weight on the CPU (built from codes and mask, so it is 2:4 by construction), or None."""
        if self.codes is None or self.scales is None:
            return None
        codes, scales = self.codes.cpu().contiguous(), self.scales.cpu().contiguous()
        if self.mask is None:
            return DenseInt4Weight(codes, scales, self.group_size).validate()
        return CompressedWeight.from_codes(codes, self.mask.cpu(), scales, self.group_size)


def clip_scales(
    columns: torch.Tensor, mask: torch.Tensor | None, cost: torch.Tensor | None, steps: int
) -> torch.Tensor:
    """Scale of each row of one group: the clip of least (weighted) squared rounding error, rounded to float16.

    Shapes: columns [g, N] fp32 (transposed group); mask bool [g, N] or None, entries that count; cost [g] or None,
    weight of each column's error; returns fp32 [N] whose values float16 holds exactly.
    """
    kept = columns if mask is None else columns * mask
    # Why 7.5: see marlin.formats.int4.group_scales.
    base = kept.abs().amax(0) / 7.5
    base = torch.where(base > 0, base, torch.ones_like(base))
    best = base.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    best_error = torch.full_like(best, torch.inf)
    for step in range(steps + 1):
        scale = (base * (1.0 - 0.5 * step / max(steps, 1))).clamp_(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        error = (kept / scale).round_().clamp_(QMIN, QMAX).mul_(scale).sub_(kept).square_()
        total = error.sum(0) if cost is None else cost @ error
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, total, best_error)
    return best


def _clip_scales(
    columns: torch.Tensor, mask: torch.Tensor | None, cost: torch.Tensor | None, steps: int
) -> tuple[torch.Tensor, ...]:
    return (clip_scales(columns, mask, cost, steps),)


def _keep_two(score: torch.Tensor) -> torch.Tensor:
    """`top2_mask` along the first dimension of score [4, N], without its check, which waits for the device."""
    index = torch.arange(4, device=score.device)
    earlier = (index.unsqueeze(0) < index.unsqueeze(1)).unsqueeze(-1)
    own, other = score.unsqueeze(1), score.unsqueeze(0)
    return ((other > own) | ((other == own) & earlier)).sum(1) < 2


def sweep_columns(
    work: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    prune: bool,
) -> tuple[torch.Tensor, ...]:
    """Treat the columns of one group in order: (done, codes, mask, scaled errors), each [g, N].

    Shapes: work [g, N], as all columns before left it; upper [g, g], the factor's part; scale [N] (None: values stay
    floating-point); mask bool [g, N], where it is already chosen. Without prune the mask returned means nothing.
    """
    size, diagonal = work.shape[0], upper.diagonal()
    done, errors = torch.empty_like(work), torch.empty_like(work)
    codes = torch.zeros_like(work, dtype=torch.int8)
    kept = torch.zeros_like(work, dtype=torch.bool) if mask is None else mask.clone()
    inverse = None if scale is None else scale.reciprocal()
    for first in range(0, size, 4):
        quad = work[first : first + 4]
        quad = quad - upper[:first, first : first + 4].T @ errors[:first] if first else quad.clone()
        if prune and mask is None:
            # The cost of dropping an entry: w^2 / U_jj^2 (SparseGPT).
            kept[first : first + 4] = _keep_two((quad / diagonal[first : first + 4, None]).square_())
        for i in range(4):
            column, at = quad[i], first + i
            target = column
            if inverse is not None and scale is not None:
                code = (column * inverse).round_().clamp_(QMIN, QMAX)
                if prune:
                    code.mul_(kept[at])
                codes[at] = code
                target = code * scale
            elif prune:
                target = column * kept[at]
            done[at] = target
            torch.sub(column, target, out=errors[at])
            errors[at].div_(diagonal[at])
            if i < 3:
                quad[i + 1 :].addr_(upper[at, at + 1 : first + 4], errors[at], alpha=-1)
    return done, codes, kept, errors


@dataclass
class _Sweep:
    """State of one sweep. work [K, N]: weights not yet treated; done [K, N]: results; codes and mask likewise."""

    work: torch.Tensor
    factor: Factor
    recipe: LayerRecipe
    group_size: int
    prune: bool
    to_codes: bool
    done: torch.Tensor
    codes: torch.Tensor
    mask: torch.Tensor
    scales: torch.Tensor

    def block(self, start: int, stop: int, scale: torch.Tensor | None, fixed: bool) -> torch.Tensor:
        """Treat columns start..stop: fills done, codes, mask; returns the scaled errors [stop - start, N].

        scale [N] (None: values stay floating-point); fixed: the mask is already chosen.
        """
        upper, mask = self.factor.upper[start:stop, start:stop], self.mask[start:stop] if fixed else None
        done, codes, kept, errors = replayed(sweep_columns, self.work[start:stop], upper, scale, mask, prune=self.prune)
        self.done[start:stop] = done
        if scale is not None:
            self.codes[start:stop] = codes
        if self.prune:
            self.mask[start:stop] = kept
        return errors

    def group_scale(self, start: int, stop: int) -> torch.Tensor:
        """Scale of the group start..stop from its weights as they stand, only kept ones counted."""
        values = self.work[start:stop]
        mask = None
        if self.prune:
            # Why: pruning moves weight onto the kept entries, so the group is first swept in floating point; its mask
            # and its final magnitudes, not those before pruning, decide the clip.
            self.block(start, stop, None, fixed=False)
            values, mask = self.done[start:stop], self.mask[start:stop]
        cost = self.factor.diagonal[start:stop].reciprocal().square()
        return replayed(_clip_scales, values, mask, cost, steps=self.recipe.search_steps)[0]

    def run(self) -> None:
        k = self.work.shape[0]
        block = self.group_size if self.group_size > 0 else DEFAULT_BLOCK
        row_scale = None
        if self.to_codes and self.group_size == -1:
            row_scale = self._row_scale()
        for start in range(0, k, block):
            stop = min(start + block, k)
            scale = row_scale
            if self.to_codes and scale is None:
                self.scales[start // block] = self.group_scale(start, stop)
                scale = self.scales[start // block]
            errors = self.block(start, stop, scale, fixed=self.to_codes and row_scale is None and self.prune)
            if stop < k:
                self.work[stop:].addmm_(self.factor.upper[start:stop, stop:].T, errors, alpha=-1)

    def _row_scale(self) -> torch.Tensor:
        mask = None
        if self.prune:
            mask = top2_mask((self.work / self.factor.diagonal[:, None]).square_().T).T
        cost = self.factor.diagonal.reciprocal().square()
        scale = clip_scales(self.work, mask, cost, self.recipe.search_steps)
        self.scales[0] = scale
        return scale


def sweep(weight: torch.Tensor, factor: Factor, recipe: LayerRecipe, group_size: int) -> Solution:
    """Prune and round in one pass: each column's error is pushed into the columns not yet treated.

    Shapes: weight [N, K] fp32. What is done follows recipe.kind: w4a16_sp24 both, w4a16_dense only rounding, sp24 only
    pruning.
    """
    n, k = weight.shape
    prune, to_codes = recipe.kind != "w4a16_dense", recipe.kind != "sp24" and recipe.method != "sparsegpt_rtn"
    groups = k // group_size if group_size > 0 else 1
    work = weight.float().T.contiguous()
    work[factor.dead] = 0
    state = _Sweep(
        work,
        factor,
        recipe,
        group_size,
        prune,
        to_codes,
        done=torch.zeros_like(work),
        codes=torch.zeros_like(work, dtype=torch.int8),
        mask=torch.zeros_like(work, dtype=torch.bool),
        scales=torch.zeros(groups, n, device=weight.device),
    )
    state.run()
    require(bool(state.done.isfinite().all()), "sweep", "weights and factor must be finite", "NaN or infinity")
    mask = state.mask.T.contiguous() if prune else None
    if not to_codes:
        return Solution(state.done.T.contiguous(), mask, None, None, group_size)
    scales, codes = state.scales.T.contiguous(), state.codes.T.contiguous()
    return Solution(codes.float() * expand_scales(scales, k), mask, codes, scales.half(), group_size)


def activation_order(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns by falling second moment of their inputs, int64 [K]: groups stay together, and fours within them.

    Why whole groups: one scale and one mask pattern belong to columns that are neighbours in the stored weight.
    """
    k = hessian.shape[0]
    size = group_size if group_size > 0 else k
    fours = hessian.diagonal().view(k // size, size // 4, 4).sum(-1)
    groups = fours.sum(-1).argsort(dim=0, descending=True, stable=True)
    inside = fours.argsort(dim=-1, descending=True, stable=True)[groups]
    starts = groups.view(-1, 1) * size + inside * 4
    return (starts.unsqueeze(-1) + torch.arange(4, device=hessian.device)).flatten()


def _unordered(solution: Solution, order: torch.Tensor) -> Solution:
    """A solution of permuted columns, its columns put back."""
    back = order.argsort()
    k = order.numel()

    def columns(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[:, back].contiguous()

    scales = solution.scales
    if scales is not None:
        groups = scales.shape[1]
        scales = scales[:, (order[:: k // groups] // (k // groups)).argsort()].contiguous()
    dense = solution.dense[:, back].contiguous()
    return Solution(dense, columns(solution.mask), columns(solution.codes), scales, solution.group_size)


def round_to_nearest(weight: torch.Tensor, mask: torch.Tensor | None, group_size: int, search_steps: int) -> Solution:
    """Round weight [N, K] to codes with a clip search on the kept entries, without moving errors."""
    n, k = weight.shape
    kept = weight.float() if mask is None else weight.float() * mask
    size = k if group_size == -1 else group_size
    columns = kept.reshape(n * (k // size), size).T.contiguous()
    mask_columns = None if mask is None else mask.reshape(n * (k // size), size).T
    scales = clip_scales(columns, mask_columns, None, search_steps).reshape(n, k // size)
    codes = quantize(kept, scales)
    if mask is not None:
        codes = codes * mask
    return Solution(codes.float() * expand_scales(scales, k), mask, codes, scales.half(), group_size)


def baseline_mask(weight: torch.Tensor, method: str, hessian: torch.Tensor | None) -> torch.Tensor:
    """Mask by |w| ("magnitude") or |w| * sqrt(H_jj) ("wanda"): weight [N, K] to bool [N, K]."""
    score = weight.float().abs()
    if method == "wanda":
        assert hessian is not None
        score = score * hessian.diagonal().clamp(min=0).sqrt()
    return top2_mask(score)


def solve(
    weight: torch.Tensor,
    recipe: LayerRecipe,
    group_size: int,
    hessian: torch.Tensor | None = None,
    factor: Factor | None = None,
) -> Solution:
    """Compress one weight (or several with the same inputs, stacked along N) by recipe.kind and recipe.method.

    Shapes: weight [N, K]; hessian [K, K] for Wanda and for order "activation"; factor for the sweeps, of the hessian
    whose columns are in the order swept (`activation_order`).
    """
    if recipe.method in ("magnitude", "wanda"):
        mask = baseline_mask(weight, recipe.method, hessian)
        if recipe.kind == "sp24":
            return Solution(weight.float() * mask, mask, None, None, group_size)
        return round_to_nearest(weight, mask, group_size, recipe.search_steps)
    if recipe.method == "rtn":
        return round_to_nearest(weight, None, group_size, recipe.search_steps)
    assert factor is not None
    if recipe.order == "activation":
        assert hessian is not None
        order = activation_order(hessian, group_size)
        solution = _unordered(sweep(weight[:, order], factor, recipe, group_size), order)
    else:
        solution = sweep(weight, factor, recipe, group_size)
    if recipe.method == "sparsegpt_rtn":
        return round_to_nearest(solution.dense, solution.mask, group_size, recipe.search_steps)
    return solution
