"""Products whose large terms cancel, so that the order in which they are added shows in the bits of every output.

With random operands the rounding of an output hides that order in all but one of thousands.
"""

from __future__ import annotations

import dataclasses

import torch

from marlin.formats import CompressedWeight, Weight
from marlin.testing.cases import random_act, random_weight


def cancelling_product(
    m: int,
    n: int,
    k: int,
    group_size: int,
    kind: str,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, Weight]:
    """act [m, k] and a weight [n, k] of two equal halves along K, for which act is 100 a and little other than -100 a.

    k: a multiple of 128, and half of it of group_size.
    """
    half = random_weight(n, k // 2, group_size, kind, dtype=dtype, device=device)
    twice = {name: torch.cat([part, part], 1) for name, part in vars(half).items() if isinstance(part, torch.Tensor)}
    if group_size == -1:
        twice["scales"] = half.scales
    weight = dataclasses.replace(half, **twice)
    assert weight.k == k and (kind != "w4a16_sp24") == (not isinstance(weight, CompressedWeight))
    loud = 100 * random_act(m, k // 2, dtype=dtype, device=device, seed=1)
    quiet = random_act(m, k // 2, dtype=dtype, device=device, seed=2)
    return torch.cat([loud, quiet / 64 - loud], 1), weight
