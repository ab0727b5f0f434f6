"""Linear layers whose INT4 weight is trained: floating-point latents that are rounded in every forward pass.

Owns the rounding with its gradients, and the way back to the canonical weight: `LatentLinear.weight()` holds exactly
the codes and scales that the last forward pass multiplied with. The mask is fixed. Knows nothing of losses, data and
schedules.

Gradients pass the rounding unchanged where the latent lies inside the code range and stop outside; the scale's is that
of the rounding error (learned step size, arXiv 1902.08153). A latent is held in units of its group's first scale, and
a scale is trained as the logarithm of its ratio to the first, which makes one learning rate fit all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from marlin.compress.solvers import LARGEST_SCALE, SMALLEST_SCALE
from marlin.errors import message, require
from marlin.formats import CompressedWeight, DenseInt4Weight, LowRank, Weight
from marlin.formats.int4 import QMAX, QMIN


def fake_quantized(
    latent: torch.Tensor, unit: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(code * scale, code), each [N, G, g], with gradients to latent and scales.

    Shapes: latent [N, G, g] fp32, in units of unit [N, G, 1]; scales [N, G, 1] fp32; mask bool [N, G, g] or None.
    """
    ratio = latent * (unit / scales)
    inside = ratio.clamp(QMIN, QMAX)
    codes = inside + (inside.round() - inside).detach()
    if mask is not None:
        codes = codes * mask
    return codes * scales, codes


class LatentLinear(nn.Module):
    """`torch.nn.Linear` with an INT4 weight under training.

    Parameters: latent fp32 [N, K] in units of `unit`, log_scale fp32 [N, G] (starts at 0), bias (the replaced layer's)
    or None. Buffers: base fp32 [N, G], the scales at the start; unit fp32 [N, G], equal to base, or to the one number
    given; mask bool [N, K] or None (dense INT4); up [N, r] and down [r, K], a low-rank correction that stays as it is,
    or None.
    """

    mask: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    base: torch.Tensor
    unit: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Weight,
        bias: nn.Parameter | None,
        learn_scales: bool,
        unit: float | None,
        low_rank: LowRank | None = None,
    ) -> None:
        super().__init__()
        for name in ("up", "down"):
            self.register_buffer(name, None if low_rank is None else getattr(low_rank, name).float())
        self.in_features, self.out_features, self.group_size = weight.k, weight.n, weight.group_size
        self.scale_dtype, self.learn_scales = weight.scales.dtype, learn_scales
        self.register_buffer("mask", weight.mask() if isinstance(weight, CompressedWeight) else None)
        self.register_buffer("base", weight.scales.float().clamp(SMALLEST_SCALE, LARGEST_SCALE))
        self.register_buffer("unit", self.base.clone() if unit is None else torch.full_like(self.base, unit))
        dense = weight.to_dense(torch.float32).view(weight.n, self.base.shape[1], -1)
        self.latent = nn.Parameter((dense / self.unit.to(dense).unsqueeze(-1)).view(weight.n, weight.k))
        self.log_scale = nn.Parameter(torch.zeros_like(self.base), requires_grad=learn_scales)
        self.register_parameter("bias", bias)

    def scales(self) -> torch.Tensor:
        """Scales as they are stored, [N, G] fp32 values that the stored dtype holds; gradients as if not rounded."""
        scales = (self.base * self.log_scale.exp()).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        return scales + (scales.to(self.scale_dtype).float() - scales).detach()

    def _grouped(self) -> tuple[torch.Tensor, torch.Tensor]:
        n, groups = self.base.shape
        mask = None if self.mask is None else self.mask.view(n, groups, -1)
        latent, unit = self.latent.view(n, groups, -1), self.unit.unsqueeze(-1)
        return fake_quantized(latent, unit, self.scales().unsqueeze(-1), mask)

    def forward(self, act: torch.Tensor) -> torch.Tensor:
        dense, _ = self._grouped()
        out = nn.functional.linear(act, dense.view_as(self.latent), self.bias)
        if self.up is None or self.down is None:
            return out
        return out + nn.functional.linear(nn.functional.linear(act, self.down), self.up)

    @torch.no_grad()
    def weight(self) -> Weight:
        """The canonical weight on the CPU. Raises: ValueError (training left a latent that is not finite)."""
        finite = bool(self.latent.isfinite().all() and self.log_scale.isfinite().all())
        require(finite, "recover", "trained weights must be finite", "NaN or infinity", "Lower the learning rate.")
        _, grouped = self._grouped()
        codes = grouped.view_as(self.latent).to(torch.int8).cpu()
        scales = self.scales().to(self.scale_dtype).cpu()
        if self.mask is None:
            return DenseInt4Weight(codes, scales, self.group_size).validate()
        return CompressedWeight.from_codes(codes, self.mask.cpu(), scales, self.group_size)


def mean_scale(weights: Mapping[str, Weight]) -> float:
    """Of all weights."""
    total = sum(float(weight.scales.double().mean()) * weight.n * weight.k for weight in weights.values())
    return total / sum(weight.n * weight.k for weight in weights.values())


def put_latents(
    model: nn.Module,
    weights: Mapping[str, Weight],
    learn_scales: bool,
    unit: float | None,
    low_rank: Mapping[str, LowRank] | None = None,
) -> dict[str, nn.Module]:
    """Put a `LatentLinear` in the place of each named module, on its device; returns what stood there.

    low_rank: corrections by name, which stay as they are; None takes those that the modules have.
    Raises: ValueError (no such module, or one that is no linear layer of the weight's shape).
    """
    op, originals = "recover", {}
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        module = modules.get(name)
        if module is None or not name:
            raise ValueError(message(op, "weights must be named as the model's modules", repr(name)))
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        got = f"{name}: weight {(weight.n, weight.k)}"
        require(shape == (weight.n, weight.k), op, f"the weight must have the layer's shape {shape}", got)
        originals[name] = module
    for name, module in originals.items():
        home = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        bias = getattr(module, "bias", None)
        low = getattr(module, "low_rank", None) if low_rank is None else low_rank.get(name)
        layer = LatentLinear(weights[name], bias, learn_scales, unit, low).to(home)
        _set(model, name, layer)
    return originals


def take_latents(model: nn.Module, originals: Mapping[str, nn.Module]) -> dict[str, Weight]:
    """Put the originals back and return the trained weights; a `torch.nn.Linear` gets their dense values."""
    weights: dict[str, Weight] = {}
    for name, module in originals.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LatentLinear)
        weights[name] = layer.weight()
        if isinstance(module, nn.Linear):
            module.weight.data = weights[name].to_dense(torch.float32).to(module.weight)
            module.to(layer.latent.device)
        _set(model, name, module)
    return weights


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
