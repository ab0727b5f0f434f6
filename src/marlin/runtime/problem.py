"""The product to compute, as the runtime sees it. Pure data; knows no tensor and no GPU."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("w4a16_sp24", "w4a16_dense")
DTYPES = ("float16", "bfloat16")


class Problem(NamedTuple):
    """out[M, N] = act[M, K] @ weight[N, K].T (+ bias).

    m, n, k: extents; k counts dense positions. group_size: 32, 64, 128 or -1 (one scale per row).
    dtype: of act, scales, bias and out, "float16" or "bfloat16". kind: "w4a16_sp24" or "w4a16_dense".
    batch_invariant: the bits of a row of out must depend on neither M nor the other rows.
    """

    m: int
    n: int
    k: int
    group_size: int
    dtype: str
    kind: str
    batch_invariant: bool = False

    @property
    def weight_bytes(self) -> float:
        """Bytes of codes, metadata and scales."""
        bits = 3 if self.kind == "w4a16_sp24" else 4
        groups = 1 if self.group_size == -1 else self.k // self.group_size
        return self.n * self.k * bits / 8 + self.n * groups * 2

    @property
    def operations(self) -> int:
        """Dense-equivalent floating-point operations."""
        return 2 * self.m * self.n * self.k
