"""Norms and SiLU-and-multiply of models whose linear layers are ours: kernels that the products start early after.

Owns the choice between our kernels and vLLM's. The classes take the place of vLLM's own in its registry of custom ops,
and do what those do unless the model is quantized by our method, or our kernel keeps layers of an ordinary checkpoint.
MARLIN_VLLM_ROWWISE=0 leaves all to vLLM.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from marlin import ops
from marlin.errors import message
from marlin.integrations.vllm import kernel
from marlin.integrations.vllm.config import SparseMarlinConfig
from marlin.ops.checks import KERNEL_DTYPES
from marlin.ops.rowwise import MAX_HIDDEN, MULTIPLE

_SWITCH = "MARLIN_VLLM_ROWWISE"
# Norms of attention heads are narrower; what follows them is no product.
_MIN_HIDDEN = 512
# Passes of vLLM's compilation, of one version or another, that join norms with the exchange between ranks.
_JOINING_PASSES = ("fuse_allreduce_rms", "enable_sp")


def wanted() -> bool:
    """Whether our kernels may be taken. Raises: ValueError (MARLIN_VLLM_ROWWISE)."""
    text = os.environ.get(_SWITCH, "1")
    if text not in ("0", "1"):
        raise ValueError(message(_SWITCH, "it must be 0 or 1", repr(text)))
    return text == "1"


def _is_our_method() -> bool:
    """Whether the model that is being built is quantized by our method."""
    return isinstance(get_current_vllm_config().quant_config, SparseMarlinConfig)


def _enabled(op: type[CustomOp]) -> bool:
    """Switch an operator on in a compiled model too, by its name in vLLM's configuration; whether it is on.

    Why there: vLLM's key of compiled models holds the configuration. Not where a pass of vLLM looks for norms to join
    with the exchange between ranks; nor what the user switched off.
    """
    compilation = get_current_vllm_config().compilation_config
    passes, named = compilation.pass_config, compilation.custom_ops
    joined = any(getattr(passes, name, False) for name in _JOINING_PASSES)
    if wanted() and _is_our_method() and not joined and not {f"+{op.name}", f"-{op.name}", "all"} & set(named):
        named.append(f"+{op.name}")
    return bool(super(op, op).enabled())


class _Chosen:
    """What both classes share: who computes."""

    def _choose(self, fits: bool) -> None:
        self._may_take = fits and wanted()
        self._takes_by_method = self._may_take and _is_our_method()

    @property
    def takes(self) -> bool:
        """Whether calls run our kernel, where values are of 16 bits."""
        # Why not once: which layers of an ordinary checkpoint our kernel keeps is known when they are loaded.
        return self._takes_by_method or (self._may_take and kernel.keeps_layers())


class MarlinRMSNorm(_Chosen, RMSNorm):
    """vLLM's RMS norm, by our kernels where they fit: 16-bit values, a weight, rows of a model's hidden size."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        whole = self.has_weight and self.variance_size_override is None
        fits = self.hidden_size % MULTIPLE == 0 and _MIN_HIDDEN <= self.hidden_size <= MAX_HIDDEN
        self._choose(whole and fits)

    @classmethod
    def enabled(cls) -> bool:
        return _enabled(cls)

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., H] normed, or x + residual normed, and that sum."""
        weight = self.weight.data
        fits = x.dtype in KERNEL_DTYPES and x.dtype == weight.dtype and x.shape[-1] == self.hidden_size
        fits = fits and (residual is None or residual.dtype == x.dtype)
        if not (self.takes and fits):
            return super().forward_cuda(x, residual)
        if residual is None:
            return ops.rms_norm(x, weight, self.variance_epsilon)
        return ops.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)


class MarlinSiluAndMul(_Chosen, SiluAndMul):
    """vLLM's SiLU-and-multiply, by our kernel where it fits: 16-bit values, halves that are multiples of 8."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._choose(True)

    @classmethod
    def enabled(cls) -> bool:
        return _enabled(cls)

    def forward_cuda(self, x: Tensor) -> Tensor:
        """silu(gate) * up [..., D] of x [..., 2 D]."""
        if not self.takes or x.dtype not in KERNEL_DTYPES or x.shape[-1] % (2 * MULTIPLE):
            return super().forward_cuda(x)
        return ops.silu_and_mul(x)


def register() -> None:
    """Put both in the places of vLLM's own; a second call changes nothing, and whoever came first stays."""
    if current_platform.is_out_of_tree():
        return
    for own, theirs in ((MarlinRMSNorm, RMSNorm), (MarlinSiluAndMul, SiluAndMul)):
        if theirs.__name__ not in op_registry_oot:
            CustomOp.register_oot(name=theirs.__name__)(own)
            own.name = theirs.name  # the name that custom_ops of vLLM's configuration has
