"""The low-rank correction of a weight: two thin matrices whose product is added to what is quantized.

Owns its shapes, dtypes and checks. Knows nothing of how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin.errors import message, require

OP = "LowRank"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LowRank:
    """up [N, r] and down [r, K], of one floating-point dtype: what a layer multiplies with is its quantized weight plus
    up @ down."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def validate(self, n: int, k: int) -> LowRank:
        """Check shapes for a weight [n, k], dtypes and values; returns self. Raises: ValueError, TypeError."""
        shapes = tuple(self.up.shape), tuple(self.down.shape)
        need = f"up and down must have shapes [{n}, r] and [r, {k}]"
        require(shapes == ((n, self.rank), (self.rank, k)) and self.rank > 0, OP, need, f"{shapes}")
        if self.up.dtype not in DTYPES or self.up.dtype != self.down.dtype:
            got = f"{self.up.dtype} and {self.down.dtype}"
            raise TypeError(message(OP, "up and down must both be float16, bfloat16 or float32", got))
        require(
            bool(self.up.isfinite().all() and self.down.isfinite().all()), OP, "values must be finite", "NaN or inf"
        )
        return self

    def to_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """up @ down in float32, rounded once to dtype: [N, K]."""
        return (self.up.float() @ self.down.float()).to(dtype)
