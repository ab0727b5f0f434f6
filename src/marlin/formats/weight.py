"""The canonical compressed weight: what the bits mean, without regard to any instruction's order.

Owns `CompressedWeight` (2:4 INT4) and `DenseInt4Weight` (INT4), their invariants and their dense values. Everything
is exact and runs on any device. Layouts (the order that kernels read) are in `marlin.formats.layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin.errors import message, require
from marlin.formats import int4, sparsity

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
N_MULTIPLE, K_MULTIPLE = 8, 32


def _check_scales(op: str, scales: torch.Tensor, n: int, k: int, group_size: int) -> None:
    groups = int4.num_groups(k, group_size, op)
    if scales.dtype not in SCALE_DTYPES:
        raise TypeError(message(op, "scales must be float16, bfloat16 or float32", str(scales.dtype)))
    require(
        tuple(scales.shape) == (n, groups),
        op,
        f"scales must have shape [N, K/group_size] = {(n, groups)}",
        str(tuple(scales.shape)),
    )
    require(bool(scales.isfinite().all()), op, "scales must be finite", "NaN or infinity", "Recompute them.")


def _check_codes(op: str, codes: torch.Tensor) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(message(op, "codes must be int8", str(codes.dtype)))
    require(codes.ndim == 2, op, "codes must have 2 dimensions", str(tuple(codes.shape)))
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    require(int4.QMIN <= low and high <= int4.QMAX, op, "codes must lie in -8..7", f"{low}..{high}")


def _check_extent(op: str, n: int, k: int) -> None:
    require(
        n > 0 and n % N_MULTIPLE == 0, op, f"N must be a positive multiple of {N_MULTIPLE}", f"N={n}", "Pad the rows."
    )
    require(
        k > 0 and k % K_MULTIPLE == 0,
        op,
        f"K must be a positive multiple of {K_MULTIPLE}",
        f"K={k}",
        "Pad the columns.",
    )


def _check_one_device(op: str, *tensors: torch.Tensor) -> None:
    devices = {str(t.device) for t in tensors}
    require(len(devices) == 1, op, "all tensors must be on one device", ", ".join(sorted(devices)))


def _exact_codes(op: str, weight: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Codes whose dense values are weight, or an error that shows the worst entry."""
    codes = int4.quantize(weight, scales)
    dense = codes.float() * int4.expand_scales(scales.float(), weight.shape[1])
    kept = weight.float() if mask is None else weight.float() * mask
    if mask is not None:
        codes, dense = codes * mask, dense * mask
    # Invariant: a fake-quantized weight is code * scale, rounded once to its own dtype.
    error = (dense.to(weight.dtype).float() - kept).abs()
    if bool((error > 0).any()):
        worst = int(error.argmax())
        n, k = divmod(worst, weight.shape[1])
        raise ValueError(
            message(
                op,
                "weight must already be fake-quantized with these scales (code * scale, code in -8..7)",
                f"weight[{n}, {k}]={float(kept[n, k])!r}, nearest {float(dense[n, k])!r}",
                "Quantize it first: marlin.compress, or marlin.SparseLinear.from_dense(..., exact=False).",
            )
        )
    return codes


@dataclass(frozen=True)
class CompressedWeight:
    """A 2:4-sparse INT4 weight [N, K].

    codes: int8 [N, K/2], the kept values in the order of their columns, -8..7.
    positions: uint8 [N, K/4], `i0 | i1 << 2` of each group of four (see `marlin.formats.sparsity`).
    scales: [N, K/group_size], float16, bfloat16 or float32, finite.
    group_size: 32, 64, 128, or -1 for one scale per row; counts dense positions.
    """

    codes: torch.Tensor
    positions: torch.Tensor
    scales: torch.Tensor
    group_size: int

    kind = "w4a16_sp24"

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        return int(self.codes.shape[1]) * 2

    def validate(self) -> CompressedWeight:
        """Check every invariant; returns self. Raises: ValueError or TypeError that names the one violated."""
        op = "CompressedWeight"
        _check_codes(op, self.codes)
        _check_extent(op, self.n, self.k)
        if self.positions.dtype != torch.uint8:
            raise TypeError(message(op, "positions must be uint8", str(self.positions.dtype)))
        expected = (self.n, self.k // 4)
        require(
            tuple(self.positions.shape) == expected,
            op,
            f"positions must have shape [N, K/4] = {expected}",
            str(tuple(self.positions.shape)),
        )
        _check_one_device(op, self.codes, self.positions, self.scales)
        if not sparsity.positions_are_legal(self.positions):
            illegal = sorted(set(self.positions.unique().tolist()) - set(sparsity.LEGAL_NIBBLES))
            requirement = f"positions must be legal 2:4 nibbles {sparsity.LEGAL_NIBBLES}"
            raise ValueError(message(op, requirement, f"values {illegal[:8]}"))
        _check_scales(op, self.scales, self.n, self.k, self.group_size)
        return self

    def mask(self) -> torch.Tensor:
        """The kept entries, bool [N, K]; a kept code may be zero."""
        return sparsity.mask_from_positions(self.positions)

    def dense_codes(self) -> torch.Tensor:
        """Codes at their dense columns, zero elsewhere: int8 [N, K]."""
        dense = torch.zeros(self.n, self.k, dtype=torch.int8, device=self.codes.device)
        return dense.scatter_(1, sparsity.kept_columns(self.positions), self.codes)

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """code * scale, exact in fp32 and rounded once to dtype (that of scales when None): [N, K]."""
        dense = self.dense_codes().float() * int4.expand_scales(self.scales.float(), self.k)
        return dense.to(dtype or self.scales.dtype)

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, scales: torch.Tensor, group_size: int, mask: torch.Tensor | None = None
    ) -> CompressedWeight:
        """Take a fake-quantized 2:4 weight apart, exactly.

        Shapes: weight [N, K]; scales [N, K/group_size]; mask [N, K] bool, exactly two of four kept. Without a mask
        the non-zeros decide, and groups with fewer than two are filled up from the lowest columns.
        Raises: ValueError (a value that is not code * scale, more than two non-zeros in a group of four, mask not
        2:4, shapes), TypeError (dtypes).
        """
        op = "CompressedWeight.from_dense"
        require(weight.ndim == 2, op, "weight must have 2 dimensions", str(tuple(weight.shape)))
        _check_extent(op, *weight.shape)
        _check_scales(op, scales, weight.shape[0], weight.shape[1], group_size)
        require(bool(weight.isfinite().all()), op, "weight must be finite", "NaN or infinity")
        if mask is None:
            nonzero = weight != 0
            worst = int(nonzero.reshape(weight.shape[0], -1, 4).sum(-1).max())
            require(
                worst <= 2,
                op,
                "weight must have at most 2 non-zeros in every 4 along K",
                f"{worst}",
                "Prune it first (marlin.compress), or pass the mask to apply.",
            )
            mask = sparsity.top2_mask(nonzero.to(torch.int8))
        require(
            tuple(mask.shape) == tuple(weight.shape) and mask.dtype == torch.bool and sparsity.is_24(mask),
            op,
            "mask must be bool [N, K] that keeps exactly 2 of every 4 along K",
            f"{mask.dtype} {tuple(mask.shape)}",
            "Build it with marlin.formats.top2_mask.",
        )
        codes = _exact_codes(op, weight, scales, mask)
        return cls.from_codes(codes, mask, scales, group_size)

    @classmethod
    def from_codes(
        cls, dense_codes: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> CompressedWeight:
        """Gather codes int8 [N, K] at mask [N, K]; entries outside the mask are dropped. Validates the result."""
        positions = sparsity.positions_from_mask(mask)
        codes = dense_codes.gather(1, sparsity.kept_columns(positions)).to(torch.int8)
        return cls(codes, positions, scales, group_size).validate()


@dataclass(frozen=True)
class DenseInt4Weight:
    """A dense INT4 weight [N, K]: codes int8 [N, K], scales [N, K/group_size] as in `CompressedWeight`."""

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    kind = "w4a16_dense"

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        return int(self.codes.shape[1])

    def validate(self) -> DenseInt4Weight:
        """Check every invariant; returns self. Raises: ValueError or TypeError that names the one violated."""
        op = "DenseInt4Weight"
        _check_codes(op, self.codes)
        _check_extent(op, self.n, self.k)
        _check_one_device(op, self.codes, self.scales)
        _check_scales(op, self.scales, self.n, self.k, self.group_size)
        return self

    def dense_codes(self) -> torch.Tensor:
        """The codes, int8 [N, K]."""
        return self.codes

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """code * scale, exact in fp32 and rounded once to dtype (that of scales when None): [N, K]."""
        dense = self.codes.float() * int4.expand_scales(self.scales.float(), self.k)
        return dense.to(dtype or self.scales.dtype)

    @classmethod
    def from_dense(cls, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> DenseInt4Weight:
        """Take a fake-quantized weight [N, K] apart, exactly. Raises: as `CompressedWeight.from_dense`."""
        op = "DenseInt4Weight.from_dense"
        require(weight.ndim == 2, op, "weight must have 2 dimensions", str(tuple(weight.shape)))
        _check_extent(op, *weight.shape)
        _check_scales(op, scales, weight.shape[0], weight.shape[1], group_size)
        require(bool(weight.isfinite().all()), op, "weight must be finite", "NaN or infinity")
        return cls(_exact_codes(op, weight, scales, None), scales, group_size)


Weight = CompressedWeight | DenseInt4Weight
