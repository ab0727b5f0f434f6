"""The optimizers of a recovery: Adam, and Muon for matrices.

Owns their steps, the learning rates of their groups, and their moments as a flat dict for a file. Knows nothing of
losses, schedules and weights.

Muon (Jordan et al., 2024) takes the direction of the momentum with all its singular values set to about 1, by five
Newton-Schulz steps, so that directions which rarely show in the gradient move as far as those which always do. A step
is scaled to the size that Adam's have (as in arXiv 2502.16982), so that learning rates mean the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from marlin.errors import require

# A polynomial whose fifth iterate takes singular values from 0.001..1 to 0.7..1.2.
POLYNOMIAL, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of a step in units of the learning rate.
STEP_RMS = 0.4
SMALLEST_NORM = 1e-20
# Elements that are made orthogonal at a time: bounds the memory that it takes.
AT_ONCE = 1 << 26


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices, about, whose singular values are 1: [B, n, k], in the dtype given; zeros stay zeros."""
    a, b, c = POLYNOMIAL
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    found = wide / wide.float().norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM).to(wide.dtype)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = a * found + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ found
    return found if wide is matrices else found.mT


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices [n, k]; in bfloat16 on a GPU, all matrices of one shape together."""

    def __init__(self, params: Any, lr: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for each in group["params"]:
                require(each.ndim == 2, "Muon", "parameters must be matrices", f"shape {tuple(each.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            shapes: dict[Any, list[nn.Parameter]] = {}
            for each in group["params"]:
                if each.grad is not None:
                    shapes.setdefault((each.shape, each.device), []).append(each)
            for (shape, _), found in shapes.items():
                count = max(1, AT_ONCE // shape.numel())
                for start in range(0, len(found), count):
                    self._step(found[start : start + count], group["lr"], group["momentum"])

    def _step(self, parameters: list[nn.Parameter], rate: float, momentum: float) -> None:
        for each in parameters:
            if "momentum" not in self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        kept = [self.state[each]["momentum"] for each in parameters]
        gradients = [each.grad for each in parameters if each.grad is not None]
        torch._foreach_lerp_(kept, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, kept, momentum))
        direction = orthogonal(ahead.bfloat16() if ahead.is_cuda else ahead).to(ahead.dtype)
        size = -rate * STEP_RMS * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_([*parameters], list(direction.unbind()), alpha=size)


class Optimizers:
    """Several optimizers that step together. factors: of each of their groups, its rate in units of the run's."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of(cls, groups: dict[str, list[nn.Parameter]], factors: dict[str, float], muon: str | None) -> Optimizers:
        """Muon for the group of that name, if any, Adam for the others; groups without parameters are left out."""
        found = {name: group for name, group in groups.items() if group}
        plain = [{"params": group, "factor": factors[name]} for name, group in found.items() if name != muon]
        fused = any(each.is_cuda for group in found.values() for each in group)
        parts: list[torch.optim.Optimizer] = []
        if plain:
            adam = torch.optim.AdamW(plain, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None)
            parts.append(adam)
        if muon in found:
            parts.append(Muon([{"params": found[muon], "factor": factors[muon]}]))
        return cls(parts)

    def step(self, rate: float) -> None:
        """One step of all at this learning rate; the gradients are dropped."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["factor"]
            part.step()
        self.drop()

    def drop(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad()

    def moments(self) -> dict[str, torch.Tensor]:
        """What the optimizers keep between steps, by a name each."""
        return {
            f"{number}.{index}.{key}": value
            for number, part in enumerate(self.parts)
            for index, moments in part.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def put(self, moments: dict[str, torch.Tensor]) -> None:
        """Take up what `moments` gave. Raises: ValueError, RuntimeError, KeyError (of other optimizers)."""
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.parts]
        for name, value in moments.items():
            number, index, key = name.split(".")
            states[int(number)].setdefault(int(index), {})[key] = value
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
