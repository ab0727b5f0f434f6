"""Refining a solved layer: coordinate descent on its output error over mask, codes and scales.

Owns the passes. Each pass goes through the groups of columns in order. A group's scale is set to the least-squares
value for its codes, then every four columns choose anew which two are kept, and their codes, with all other columns of
the layer as they stand; a dense layer chooses one code at a time. No step raises the error. Knows nothing of models and
of how the first solution was found.

Error: tr(E H E^T) with E = values - target, H the damped second moments of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

from marlin.compress.graphs import replayed
from marlin.compress.hessian import damped
from marlin.compress.solvers import DEFAULT_BLOCK, LARGEST_SCALE, SMALLEST_SCALE, Solution
from marlin.formats import expand_scales
from marlin.formats.int4 import QMAX, QMIN

PAIRS = tuple(combinations(range(4), 2))


def _pair_maps(hessian: torch.Tensor) -> torch.Tensor:
    """Maps from the unconstrained best values of four columns to the best ones with only a pair kept.

    Shapes: hessian [K, K]; returns [K/4, 6, 4, 4], rows outside the pair zero.
    """
    k = hessian.shape[0]
    index = torch.arange(k, device=hessian.device).view(-1, 4)
    blocks = hessian[index.unsqueeze(2), index.unsqueeze(1)]
    maps = torch.zeros(k // 4, len(PAIRS), 4, 4, device=hessian.device)
    for number, pair in enumerate(PAIRS):
        kept = list(pair)
        maps[:, number, kept] = torch.linalg.solve(blocks[:, kept][:, :, kept], blocks[:, kept])
    return maps


@dataclass(frozen=True)
class _Group:
    """One group of columns under refinement. values, codes [g, N]; mask bool [g, N]; scale [N]; hessian [g, g]; maps
    [g/4, 6, 4, 4]; quads and inverse [g/4, 4, 4]; kept bool [7, 4, 1], the masks of PAIRS and a place for one more."""

    values: torch.Tensor
    codes: torch.Tensor
    mask: torch.Tensor
    scale: torch.Tensor
    hessian: torch.Tensor
    maps: torch.Tensor
    quads: torch.Tensor
    inverse: torch.Tensor
    kept: torch.Tensor

    def four(self, first: int, gradient: torch.Tensor) -> torch.Tensor:
        """Choose four columns anew; returns the change of their values [4, N]."""
        part, number = slice(first, first + 4), first // 4
        old, block = self.values[part].clone(), self.quads[number]
        best = old - self.inverse[number] @ gradient
        wanted = self.maps[number] @ best
        codes = (wanted / self.scale).round_().clamp_(QMIN, QMAX)
        codes = torch.cat([codes, self.codes[part].unsqueeze(0)])
        away = codes * self.scale - best
        cost = (away * (block @ away)).sum(1)
        # Why the last: what stands now wins where nothing is better, so that no step raises the error.
        cost[-1] *= 1 - 1e-6
        choice = cost.argmin(0)
        masks = self.kept.expand(-1, -1, codes.shape[2]).clone()
        masks[-1] = self.mask[part]
        picked = choice.view(1, 1, -1).expand(1, 4, -1)
        self.codes[part] = codes.gather(0, picked)[0]
        self.mask[part] = masks.gather(0, picked)[0]
        self.values[part] = self.codes[part] * self.scale
        return self.values[part] - old


def refine_sparse(gradient: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(values, codes, mask) of a 2:4 group after one pass; gradient [g, N], tensors as the fields of `_Group`."""
    changed, gradient = [tensor.clone() for tensor in tensors[:3]], gradient.clone()
    group = _Group(*changed, *tensors[3:])
    for first in range(0, gradient.shape[0], 4):
        change = group.four(first, gradient[first : first + 4])
        gradient.addmm_(group.hessian[:, first : first + 4], change)
    return group.values, group.codes, group.mask


def refine_dense(
    gradient: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(values, codes) of a dense group after one pass, one code at a time; shapes as in `_Group`."""
    values, codes, gradient = values.clone(), codes.clone(), gradient.clone()
    for first in range(0, gradient.shape[0], 4):
        part = slice(first, first + 4)
        old, slope = values[part].clone(), gradient[part].clone()
        for i in range(4):
            at = first + i
            wanted = values[at] - slope[i] / hessian[at, at]
            code = (wanted / scale).round_().clamp_(QMIN, QMAX)
            change = code * scale - values[at]
            codes[at], values[at] = code, code * scale
            slope.addr_(hessian[part, at], change)
        gradient.addmm_(hessian[:, part], values[part] - old)
    return values, codes


@dataclass
class _Pass:
    """State: values, codes, mask [K, N] and scales [G, N], transposed; target [K, N]; hessian damped."""

    hessian: torch.Tensor
    target: torch.Tensor
    codes: torch.Tensor
    mask: torch.Tensor | None
    scales: torch.Tensor
    group: int

    def __post_init__(self) -> None:
        self.values = self.codes * self.scales.repeat_interleave(self.group, 0)[: self.codes.shape[0]]
        if self.mask is None:
            return
        self.maps = _pair_maps(self.hessian)
        index = torch.arange(self.hessian.shape[0], device=self.hessian.device).view(-1, 4)
        self.quads = self.hessian[index.unsqueeze(2), index.unsqueeze(1)]
        self.inverse = torch.linalg.inv(self.quads)
        kept = torch.zeros(len(PAIRS) + 1, 4, 1, dtype=torch.bool)
        for number, pair in enumerate(PAIRS):
            kept[number, list(pair)] = True
        self.kept = kept.to(self.hessian.device)

    def run(self, fit_scales: bool) -> None:
        """One pass over all groups."""
        k, size = self.hessian.shape[0], min(self.group, DEFAULT_BLOCK)
        for start in range(0, k, size):
            stop = min(start + size, k)
            rows = self.hessian[start:stop]
            gradient = rows @ (self.values - self.target)
            scale = self.scales[start // self.group]
            if fit_scales:
                scale = self._scale(start, stop, scale, gradient)
                self.scales[start // self.group] = scale
                gradient = rows @ (self.values - self.target)
            self._columns(slice(start, stop), gradient, scale)

    def _columns(self, part: slice, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        """Choose the columns of one group anew."""
        values, codes, own = self.values[part], self.codes[part], self.hessian[part, part]
        if self.mask is None:
            self.values[part], self.codes[part] = replayed(refine_dense, gradient, values, codes, scale, own)
            return
        fours = slice(part.start // 4, part.stop // 4)
        found = replayed(
            refine_sparse, gradient, values, codes, self.mask[part], scale, own,
            self.maps[fours], self.quads[fours], self.inverse[fours], self.kept,
        )  # fmt: skip
        self.values[part], self.codes[part], self.mask[part] = found

    def _scale(self, start: int, stop: int, scale: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The scale of least error for the codes of this group, kept where rounding it to float16 does not help."""
        codes = self.codes[start:stop]
        curvature = (codes * (self.hessian[start:stop, start:stop] @ codes)).sum(0)
        slope = (codes * gradient).sum(0)
        found = torch.where(curvature > 0, scale - slope / curvature.clamp(min=1e-30), scale)
        found = found.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        step = found - scale
        better = 2 * step * slope + step.square() * curvature < 0
        scale = torch.where(better, found, scale)
        self.values[start:stop] = codes * scale
        return scale


def refine(solution: Solution, target: torch.Tensor, hessian: torch.Tensor, damping: float, passes: int) -> Solution:
    """Lower a solution's output error by `passes` passes of coordinate descent.

    Shapes: target [N, K], what the outputs are compared with; hessian [K, K], undamped; damping: share of its mean
    diagonal. A floating-point solution is returned as it is. Scales stay float16 values; one scale per row is not
    fitted anew.
    """
    if solution.codes is None or solution.scales is None:
        return solution
    k = target.shape[1]
    goal = target.float().T.contiguous()
    goal[hessian.diagonal() <= 0] = 0
    mask = None if solution.mask is None else solution.mask.T.contiguous()
    group = solution.group_size if solution.group_size > 0 else k
    scales = solution.scales.float().T.contiguous()
    state = _Pass(damped(hessian, damping), goal, solution.codes.T.float().contiguous(), mask, scales, group)
    for _ in range(passes):
        state.run(fit_scales=solution.group_size > 0)
    codes = state.codes.T.to(torch.int8).contiguous()
    scales = state.scales.T.contiguous()
    kept = None if state.mask is None else state.mask.T.contiguous()
    dense = codes.float() * expand_scales(scales, k)
    return Solution(dense, kept, codes, scales.half(), solution.group_size)
