"""The product in float64, from the canonical weight.

Owns its own dequantization: no code is shared with `formats`, whose `to_dense` it checks. Knows the fields of a
weight (codes, positions, scales, group_size) and what they mean; knows nothing of layouts, ops or kernels.
"""

from __future__ import annotations

import torch

from marlin.formats import CompressedWeight, Weight


def dequantize(weight: Weight, device: torch.device | str | None = None) -> torch.Tensor:
    """The exact value of every weight: float64 [N, K], on `device` (that of the codes when None).

    A product of a code and a 16-bit or 32-bit scale has at most 28 significant bits, so float64 holds it exactly.
    """
    device = weight.codes.device if device is None else torch.device(device)
    codes = weight.codes.to(device)
    rows = codes.shape[0]
    if isinstance(weight, CompressedWeight):
        pairs = codes.to(torch.float64).reshape(rows, -1, 2)
        nibbles = weight.positions.to(device).to(torch.int16)
        first, second = nibbles % 4, nibbles.div(4, rounding_mode="floor")
        # Why: a sum over both kept values, and not a scatter, so that a kept pair on one column would show.
        lanes = [pairs[..., 0] * (first == i) + pairs[..., 1] * (second == i) for i in range(4)]
        values = torch.stack(lanes, dim=-1).reshape(rows, -1)
    else:
        values = codes.to(torch.float64)
    columns = values.shape[1]
    width = columns if weight.group_size == -1 else weight.group_size
    grouped = values.reshape(rows, columns // width, width)
    return (grouped * weight.scales.to(device, torch.float64).unsqueeze(-1)).reshape(rows, columns)


def linear(act: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """act @ weight.T + bias in float64, on the device of act.

    Shapes: act [M, K] or [..., K], any real dtype; bias [N]; returns float64 [M, N] or [..., N]. Weights are exact, and
    pruned entries are zeros: where act is infinite or NaN, the whole row is.
    """
    product = act.to(torch.float64) @ dequantize(weight, act.device).T
    return product if bias is None else product + bias.to(act.device, torch.float64)
