"""What an operator refuses before any work, once for both kinds and all devices. Looks at metadata, never at values."""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.errors import message, require
from marlin.formats.int4 import num_groups
from marlin.formats.layouts import TILE_K, TILE_N, TILE_WORDS
from marlin.formats.weight import SCALE_DTYPES

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def _check_dtypes(op: str, act: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Kernels take one 16-bit dtype. The CPU takes float32 as well, then with scales and bias of any dtype."""
    allowed = KERNEL_DTYPES if act.device.type == "cuda" else SCALE_DTYPES
    names = " or ".join(str(dtype) for dtype in allowed)
    for name, tensor in (("act", act), ("scales", scales), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            raise TypeError(message(op, f"{name} must be {names}", str(tensor.dtype), "Cast it with .to(dtype)."))
        if tensor.dtype != act.dtype and act.dtype != torch.float32:
            got = f"act {act.dtype}, {name} {tensor.dtype}"
            fix = "Cast act, or the layer with .to(dtype)."
            raise TypeError(message(op, f"act and {name} must have the same dtype", got, fix))


def check(
    op: str,
    act: Tensor,
    codes: Tensor,
    meta: Tensor | None,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
) -> None:
    """Refuse what no implementation can compute; `op` is the kind. Raises: ValueError, TypeError."""
    named = {"act": act, "codes": codes, "meta": meta, "scales": scales, "bias": bias}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    if any(tensor.device != act.device for tensor in tensors.values()):
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(message(op, "all tensors must be on one device", got, "Move the input or the layer."))
    _check_dtypes(op, act, scales, bias)
    require(act.ndim >= 1, op, "act must have at least 1 dimension", "a scalar")
    k = act.shape[-1]
    require(n > 0 and n % 8 == 0, op, "n must be a positive multiple of 8", f"n={n}")
    require(k > 0 and k % 32 == 0, op, "act must end in K, a positive multiple of 32", f"shape {tuple(act.shape)}")
    groups = num_groups(k, group_size, op)
    tiles = (-(-n // TILE_N), -(-k // TILE_K))
    code_words, meta_words = TILE_WORDS[op]
    expected: dict[str, tuple[int, ...]] = {"codes": (*tiles, code_words), "meta": (*tiles, meta_words)}
    expected |= {"scales": (tiles[0], groups, TILE_N), "bias": (n,)}
    for name, tensor in tensors.items():
        if name != "act" and tuple(tensor.shape) != expected[name]:
            requirement = f"{name} must have shape {expected[name]} for K={k}, n={n}, group_size={group_size}"
            fix = "Check act's last dimension, and n and group_size of the packed weight."
            raise ValueError(message(op, requirement, str(tuple(tensor.shape)), fix))
        if name in ("codes", "meta") and tensor.dtype != torch.int32:
            fix = "Pack with marlin.formats.layouts.pack."
            raise TypeError(message(op, f"{name} must be int32", str(tensor.dtype), fix))


def check_out(op: str, act: Tensor, n: int, out: Tensor) -> None:
    """Refuse an output that cannot take [M, N]. Raises: ValueError, RuntimeError (gradients wanted)."""
    m = act.numel() // act.shape[-1]
    fits = out.ndim > 0 and out.shape[-1] == n and out.numel() == m * n
    if not (fits and out.dtype == act.dtype and out.device == act.device and out.is_contiguous()):
        requirement = f"out must be contiguous, [M, N] = [{m}, {n}], {act.dtype} on {act.device}"
        got = f"{tuple(out.shape)} with strides {out.stride()}, {out.dtype} on {out.device}"
        raise ValueError(message(op, requirement, got))
    if torch.is_grad_enabled() and act.requires_grad:
        fix = f"Use {op} without _out, or torch.no_grad()."
        raise RuntimeError(message(op, "writing into out must not need gradients", "act with requires_grad", fix))
