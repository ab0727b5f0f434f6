"""The kernel for ordinary INT4 checkpoints: takes over a layer whose zeros turn out to be 2:4, hands on any other.

Owns the decision, which needs loaded weights: vLLM chooses kernels by shapes alone, so ours comes first in its list
and, for a weight that is not 2:4, puts itself in front of the kernel that vLLM would have chosen without it.
MARLIN_VLLM_DENSE=1 takes dense INT4 weights as well.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS,
    MPLinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from marlin import ops
from marlin.errors import message
from marlin.formats.int4 import GROUP_SIZES
from marlin.formats.layouts import PackedWeight, pack
from marlin.formats.published import Facts, read_pack_quantized
from marlin.formats.weight import K_MULTIPLE, N_MULTIPLE, CompressedWeight

_choosing = threading.local()
_kept = 0  # layers of this process
_DTYPES = (torch.float16, torch.bfloat16)


def takes_dense() -> bool:
    """Whether dense INT4 weights are taken too. Raises: ValueError (MARLIN_VLLM_DENSE)."""
    text = os.environ.get("MARLIN_VLLM_DENSE", "0")
    if text not in ("0", "1"):
        raise ValueError(message("MARLIN_VLLM_DENSE", "it must be 0 or 1", repr(text)))
    return text == "1"


def keeps_layers() -> bool:
    """Whether the kernel has kept any layer of a model of this process."""
    return _kept > 0


class SparseMarlinLinearKernel(MPLinearKernel):
    """W4A16, symmetric, groups in the order of the columns; vLLM's parameters before processing, ours after it."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """(yes, None) or (no, why), by shapes and types."""
        k, n = c.partition_weight_shape
        group_size = -1 if c.group_size == c.full_weight_shape[0] else c.group_size
        for fits, why in (
            (not getattr(_choosing, "others", False), "another kernel is being chosen"),
            (c.weight_type == scalar_types.uint4b8 and not c.zero_points, "weights must be symmetric INT4"),
            (not getattr(c, "has_g_idx", False), "groups must follow the columns"),
            (c.act_type in _DTYPES, "activations must be fp16 or bf16"),
            (group_size in GROUP_SIZES, f"group_size must be one of {GROUP_SIZES}, got {c.group_size}"),
            (group_size == -1 or k % group_size == 0, f"K={k} must be a multiple of group_size={group_size}"),
            (n % N_MULTIPLE == 0 and k % K_MULTIPLE == 0, f"N={n} and K={k} must be multiples of 8 and 32"),
        ):
            if not fits:
                return False, f"SparseMarlin: {why}"
        return True, None

    def __init__(self, c: MPLinearLayerConfig, w_q_param_name: str, w_s_param_name: str, *names: Any, **named: Any):
        super().__init__(c, w_q_param_name, w_s_param_name, *names, **named)
        self._rest = (names, named)
        self.delegate: MPLinearKernel | None = None
        self.packed: tuple[str, int, int] | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Look at the weight, then keep it packed or hand it on. Raises: what the other kernel raises."""
        weight = read_pack_quantized(self._loaded(layer), Facts(), "")
        if isinstance(weight, CompressedWeight) or takes_dense():
            self._keep(layer, pack(weight, self.config.act_type))
            return
        self.delegate = self._choose_other()
        self.delegate.process_weights_after_loading(layer)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]."""
        if self.packed is None:
            assert self.delegate is not None
            return self.delegate.apply_weights(layer, x, bias)
        kind, n, group_size = self.packed
        meta = layer.marlin_meta if kind == "w4a16_sp24" else None
        operands = (getattr(layer, self.w_q_name), meta, getattr(layer, self.w_s_name), bias)
        return ops.packed_linear(kind, x, operands, n, group_size)

    def _loaded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The layer's tensors as compressed-tensors names and orders them, without copying."""
        tensors = []
        for name in (self.w_q_name, self.w_s_name):
            parameter = getattr(layer, name)
            is_transposed = getattr(parameter, "output_dim", 0) == 1
            tensors.append(parameter.data.t() if is_transposed else parameter.data)
        k, n = self.config.partition_weight_shape
        return {"weight_packed": tensors[0], "weight_scale": tensors[1], "weight_shape": torch.tensor([n, k])}

    def _keep(self, layer: nn.Module, packed: PackedWeight) -> None:
        for name, tensor in (
            (self.w_q_name, packed.codes),
            (self.w_s_name, packed.scales),
            ("marlin_meta", packed.meta),
        ):
            if tensor is not None:
                delattr(layer, name) if hasattr(layer, name) else None
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.packed = (packed.kind, packed.n, packed.group_size)
        global _kept
        _kept += 1

    def _choose_other(self) -> MPLinearKernel:
        """The kernel that vLLM would have chosen without ours."""
        _choosing.others = True
        try:
            kind = choose_mp_linear_kernel(self.config)
        finally:
            _choosing.others = False
        names, named = self._rest
        return kind(self.config, self.w_q_name, self.w_s_name, *names, **named)


def register() -> None:
    """Put the kernel before vLLM's own; a second call changes nothing."""
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if SparseMarlinLinearKernel not in kernels:
        kernels.insert(0, SparseMarlinLinearKernel)
