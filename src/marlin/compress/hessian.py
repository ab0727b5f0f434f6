"""Second moments of a layer's inputs: accumulation, damping and the factor that the solvers sweep over.

Owns H = mean of x x^T over calibration tokens, and the upper factor U with inverse(H + damping) = U^T U. Knows
nothing of masks or codes.

All token positions count: leaving out the first few (attention sinks) ruins what the sweep does to the layers
that create them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from marlin.errors import message, require

MAX_DAMPING = 1.0


class DampingWarning(UserWarning):
    """The Hessian could not be factored with the damping asked for; a larger one was used and recorded."""


class HessianSum:
    """Streaming sum of x x^T in fp32 over calibration tokens.

    k: in_features; device: where the [K, K] sum lives.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., K], any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def merge(self, other: HessianSum) -> None:
        """Add another sum, which may be on another device."""
        self.total.add_(other.total.to(self.total.device))
        self.tokens += other.tokens

    def mean(self, name: str) -> torch.Tensor:
        """H = mean of x x^T, fp32 [K, K].

        Raises: ValueError (no tokens, or an input that was NaN or infinite). name appears in the message.
        """
        op = f"hessian of {name}"
        require(self.tokens > 0, op, "calibration must reach the layer", "0 tokens", "Use more calibration text.")
        mean = self.total / self.tokens
        require(
            bool(mean.isfinite().all()),
            op,
            "calibration inputs must be finite",
            "NaN or infinity",
            "Check the model in this dtype on the calibration text; bfloat16 or float32 overflow later than float16.",
        )
        return mean


@dataclass(frozen=True)
class Factor:
    """upper: U [K, K] fp32, upper triangular, inverse(H + damping * mean diagonal) = U^T U.

    diagonal: of U, positive. dead: bool [K], columns that no calibration token ever used (their weights carry
    nothing and are zeroed). damping: the share used in the end.
    """

    upper: torch.Tensor
    diagonal: torch.Tensor
    dead: torch.Tensor
    damping: float


def _try_factor(hessian: torch.Tensor, amount: float) -> torch.Tensor | None:
    # Why flipped: with flip(H) = L L^T, R = flip(L) is upper and H = R R^T, so U = inverse(R). One factorization
    # and one triangular inverse, instead of factoring the inverse again.
    damped = hessian.clone()
    damped.diagonal().add_(amount)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) != 0:
        return None
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1).contiguous(), identity, upper=True)
    return upper if bool(upper.isfinite().all()) else None


def factor(hessian: torch.Tensor, damping: float, name: str = "layer") -> Factor:
    """Factor the inverse of the damped Hessian; the damping grows tenfold until that succeeds, with a warning.

    Shapes: hessian [K, K] fp32, symmetric.
    Raises: ValueError (not finite, or no damping up to 1 helps: never a silent fall-back to the identity).
    """
    op = f"factor of {name}"
    require(bool(hessian.isfinite().all()), op, "the Hessian must be finite", "NaN or infinity")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1.0
    live_mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    share = damping
    while True:
        upper = _try_factor(hessian, share * live_mean)
        if upper is not None:
            break
        if share >= MAX_DAMPING:
            raise ValueError(
                message(
                    op,
                    "the Hessian must be positive definite with damping up to 1",
                    f"a factorization that fails at damping {share:g}",
                    "Use more calibration tokens, or method 'magnitude' or 'rtn' for this layer.",
                )
            )
        share = min(max(share * 10, 1e-4), MAX_DAMPING)
    if share != damping:
        warnings.warn(
            f"{op}: the Hessian is not positive definite with damping {damping:g}; used {share:g}. "
            "More calibration tokens than in_features avoid this.",
            DampingWarning,
            stacklevel=2,
        )
    return Factor(upper, upper.diagonal().clone(), dead, share)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """A copy, fp32 [K, K], with a share (at least 1e-4) of the mean diagonal added, and 1 for columns never used."""
    result = hessian.float().clone()
    dead = result.diagonal() <= 0
    result.diagonal()[dead] = 1.0
    live = hessian.diagonal()[~dead]
    result.diagonal().add_(max(damping, 1e-4) * (float(live.mean()) if live.numel() else 1.0))
    return result


def output_error(weight: torch.Tensor, approx: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative squared error of a layer's outputs: tr(D H D^T) / tr(W H W^T) with D = W - approx; [N, K] each."""
    delta = weight - approx
    lost = float(((delta @ hessian) * delta).sum())
    whole = float(((weight @ hessian) * weight).sum())
    return lost / whole if whole > 0 else 0.0
