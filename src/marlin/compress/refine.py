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
        self.maps = None if self.mask is None else _pair_maps(self.hessian)
        index = torch.arange(self.hessian.shape[0], device=self.hessian.device).view(-1, 4)
        self.quads = self.hessian[index.unsqueeze(2), index.unsqueeze(1)]
        self.inverse = torch.linalg.inv(self.quads)

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
            for first in range(start, stop, 4):
                change = self._quad(first, gradient[first - start : first - start + 4], scale)
                gradient.addmm_(rows[:, first : first + 4], change)

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

    def _quad(self, first: int, gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Choose four columns anew; returns the change of their values [4, N]."""
        part = slice(first, first + 4)
        old, block = self.values[part].clone(), self.quads[first // 4]
        best = old - self.inverse[first // 4] @ gradient
        if self.maps is None:
            return self._columns(first, gradient, scale)
        wanted = self.maps[first // 4] @ best
        codes = (wanted / scale).round_().clamp_(QMIN, QMAX)
        codes = torch.cat([codes, self.codes[part].unsqueeze(0)])
        away = codes * scale - best
        cost = (away * (block @ away)).sum(1)
        # Why the last: what stands now wins where nothing is better, so that no step raises the error.
        cost[-1] *= 1 - 1e-6
        choice = cost.argmin(0)
        assert self.mask is not None
        kept = torch.zeros(len(PAIRS) + 1, 4, 1, dtype=torch.bool, device=codes.device)
        for number, pair in enumerate(PAIRS):
            kept[number, list(pair)] = True
        masks = kept.expand(-1, -1, codes.shape[2]).clone()
        masks[-1] = self.mask[part]
        picked = choice.view(1, 1, -1).expand(1, 4, -1)
        self.codes[part] = codes.gather(0, picked)[0]
        self.mask[part] = masks.gather(0, picked)[0]
        self.values[part] = self.codes[part] * scale
        return self.values[part] - old

    def _columns(self, first: int, gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """One code at a time, for dense layers."""
        old, gradient = self.values[first : first + 4].clone(), gradient.clone()
        for i in range(4):
            at = first + i
            wanted = self.values[at] - gradient[i] / self.hessian[at, at]
            code = (wanted / scale).round_().clamp_(QMIN, QMAX)
            change = code * scale - self.values[at]
            self.codes[at], self.values[at] = code, code * scale
            gradient.addr_(self.hessian[first : first + 4, at], change)
        return self.values[first : first + 4] - old


def refine(solution: Solution, target: torch.Tensor, hessian: torch.Tensor, damping: float, passes: int) -> Solution:
    """Lower a solution's output error by `passes` passes of coordinate descent.

    Shapes: target [N, K], what the outputs are compared with; hessian [K, K], undamped; damping: share of its mean
    diagonal. A floating-point solution is returned as it is. Scales stay float16 values; one scale per row is not
    fitted anew.
    """
    if solution.codes is None or solution.scales is None:
        return solution
    k = target.shape[1]
    damped = hessian.float().clone()
    dead = damped.diagonal() <= 0
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(max(damping, 1e-4) * float(hessian.diagonal()[~dead].mean()))
    goal = target.float().T.contiguous()
    goal[dead] = 0
    mask = None if solution.mask is None else solution.mask.T.contiguous()
    group = solution.group_size if solution.group_size > 0 else k
    scales = solution.scales.float().T.contiguous()
    state = _Pass(damped, goal, solution.codes.T.float().contiguous(), mask, scales, group)
    for _ in range(passes):
        state.run(fit_scales=solution.group_size > 0)
    codes = state.codes.T.to(torch.int8).contiguous()
    scales = state.scales.T.contiguous()
    kept = None if state.mask is None else state.mask.T.contiguous()
    dense = codes.float() * expand_scales(scales, k)
    return Solution(dense, kept, codes, scales.half(), solution.group_size)
