"""The bound that every implementation of the product is held to: elementwise, and derived.

Owns the bound and its check. With u the unit roundoff of the output's dtype and w the exact weight,

    |out - ref| <= u |ref| + 6 (u / 2) sqrt((act^2) @ (w^2).T)

which is one rounding of the output, and six standard deviations of the errors of weights rounded to that dtype (at
most u |w| each, of random sign); fp32 accumulation is far below both. Two terms for what these leave out:

    underflow     half of the smallest subnormal, since a subnormal output is rounded to it and not to u |ref|
    accumulation  float32 outputs only: 6 (u / 2) sqrt(K) sqrt((act^2) @ (w^2).T), the rounding errors of K additions

Averages over the whole tensor are no substitute: a column of zeros, a wrong group scale or a skipped k-step passes
them. Knows the canonical weight through the oracle, and nothing of what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from marlin.errors import message
from marlin.formats import Weight
from marlin.testing import oracle

# Unit roundoff: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_MIN_EXPONENT = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}
_MAX_EXPONENT = {torch.float16: 15, torch.bfloat16: 127, torch.float32: 127}
_CHUNK_ENTRIES = 1 << 24
_SHOWN = 5


@dataclass(frozen=True)
class _Bad:
    """One entry outside the bound; excess is its error in units of the bound."""

    excess: float
    row: int
    column: int
    out: float
    ref: float
    bound: float

    def __str__(self) -> str:
        return f"[{self.row}, {self.column}] out={self.out:.9g} ref={self.ref:.9g} bound={self.bound:.3g}"


def overflow_limit(dtype: torch.dtype) -> float:
    """The smallest magnitude that rounds to infinity: 65520 for float16."""
    return 2.0 ** (_MAX_EXPONENT[dtype] + 1) * (1.0 - UNIT_ROUNDOFF[dtype] / 2)


def bound(ref: torch.Tensor, spread: torch.Tensor, dtype: torch.dtype, k: int) -> torch.Tensor:
    """How far out may be from ref. ref, spread = sqrt((act^2) @ (w^2).T): float64 [M, N]; returns float64 [M, N]."""
    u = UNIT_ROUNDOFF[dtype]
    underflow = 2.0 ** (_MIN_EXPONENT[dtype] - 1)
    accumulation = math.sqrt(k) if dtype == torch.float32 else 0.0
    return u * ref.abs() + 6 * (u / 2) * (1.0 + accumulation) * spread + underflow


def check(
    out: torch.Tensor, act: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, *, name: str = ""
) -> None:
    """Raise AssertionError unless every entry of out is within the bound of act @ weight.T + bias.

    Shapes: out [..., N] float16, bfloat16 or float32; act [..., K]; bias [N], which is added before the one rounding.
    Runs in float64 on the device of act, a slice of M at a time. Where the reference is not finite, out must be the
    same (NaN where NaN); where it is beyond the range of the dtype, out may be infinite. (The tensor core skips pruned
    entries, while in the reference infinity times a pruned weight is NaN: give finite activations to check kernels.)
    Raises: AssertionError with the number of bad entries and the worst of them; TypeError (dtype of out).
    """
    name = name or "out"
    if out.dtype not in UNIT_ROUNDOFF:
        raise TypeError(message("tolerance.check", "out must be float16, bfloat16 or float32", str(out.dtype)))
    expected = (*act.shape[:-1], weight.n)
    if tuple(out.shape) != expected:
        raise AssertionError(f"{name}: shape must be {expected}; got {tuple(out.shape)}")
    rows = act.detach().reshape(-1, act.shape[-1])
    found = out.detach().to(act.device).reshape(-1, weight.n)
    worst: list[_Bad] = []
    count, bad_rows, bad_columns = 0, 0, torch.zeros(weight.n, dtype=torch.bool, device=act.device)
    for start, ref, limit in _chunks(rows, weight, bias, out.dtype):
        part = found[start : start + ref.shape[0]].to(torch.float64)
        excess = _excess(part, ref, limit, overflow_limit(out.dtype))
        bad = excess > 1
        if bool(bad.any()):
            count += int(bad.sum())
            bad_rows += int(bad.any(1).sum())
            bad_columns |= bad.any(0)
            worst = _worst([*worst, *_entries(start, part, ref, limit, excess)])
    if count:
        raise AssertionError(
            f"{name}: {count} of {found.numel()} entries outside the bound, in {bad_rows} of {found.shape[0]} rows and "
            f"{int(bad_columns.sum())} of {weight.n} columns; worst:\n  " + "\n  ".join(map(str, worst))
        )


def _chunks(
    rows: torch.Tensor, weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first row, reference, bound) for slices of M."""
    exact = oracle.dequantize(weight, rows.device)
    squared = exact.square()
    shift = None if bias is None else bias.detach().to(rows.device, torch.float64)
    step = max(1, _CHUNK_ENTRIES // max(exact.shape))
    for start in range(0, rows.shape[0], step):
        act = rows[start : start + step].to(torch.float64)
        ref = act @ exact.T
        if shift is not None:
            ref += shift
        spread = (act.square() @ squared.T).sqrt_()
        yield start, ref, bound(ref, spread, dtype, exact.shape[1])


def _excess(out: torch.Tensor, ref: torch.Tensor, limit: torch.Tensor, overflow: float) -> torch.Tensor:
    """Error in units of the bound, infinite where out is not finite and should be, or the other way round."""
    excess = (out - ref).abs() / limit
    same = (out == ref) | (out.isnan() & ref.isnan())
    overflowed = out.isinf() & (out.sign() == ref.sign()) & (ref.abs() + limit >= overflow)
    finite = out.isfinite() & ref.isfinite()
    return torch.where(same | overflowed, 0.0, torch.where(finite, excess, torch.inf))


def _entries(
    start: int, out: torch.Tensor, ref: torch.Tensor, limit: torch.Tensor, excess: torch.Tensor
) -> Iterator[_Bad]:
    bad = (excess > 1).nonzero()
    order = excess[bad[:, 0], bad[:, 1]].argsort(descending=True, stable=True)
    for row, column in bad[order[:_SHOWN]].tolist():
        at = (row, column)
        yield _Bad(float(excess[at]), start + row, column, float(out[at]), float(ref[at]), float(limit[at]))


def _worst(entries: list[_Bad]) -> list[_Bad]:
    return sorted(entries, key=lambda bad: -bad.excess)[:_SHOWN]
