"""The operators between products, row by row: `marlin::rms_norm`, `marlin::fused_add_rms_norm`, `marlin::silu_and_mul`.

    rms_norm            round(x * rsqrt(mean(x^2) + eps)) * weight
    fused_add_rms_norm  that of z = round(x + residual), and z
    silu_and_mul        round(silu(gate)) * up, of gate | up

Values are of one 16-bit type; rounding is to it, all else is fp32. A row's bits depend on that row alone. Importing
this registers them under `torch.ops.marlin`. They change none of their arguments and are not differentiable. On Hopper
their kernels let the next of ours start early, and start early after one. Must not know what stands around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from marlin.errors import message, require
from marlin.ops import cuda
from marlin.ops.checks import KERNEL_DTYPES
from marlin.ops.direct import current_device, empty, is_compiling, is_plain, raw_stream, rows

MULTIPLE, MAX_HIDDEN = 8, 32768  # of the values of a row
_NORM, _ADD, _SILU = "rms_norm", "fused_add_rms_norm", "silu_and_mul"
_MAX_REMEMBERED = 8192


class _Call(NamedTuple):
    """What calls of one signature share. width: of a row of x; plan and kernel: of the runtime, None for no rows."""

    width: int
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    plan: Any
    kernel: Any


_calls: dict[tuple[Any, ...], _Call] = {}


def _check_x(op: str, x: Tensor, multiple: int) -> int:
    """The last extent of x. Raises: ValueError, TypeError."""
    allowed = KERNEL_DTYPES if x.is_cuda else (*KERNEL_DTYPES, torch.float32)
    if x.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(message(op, f"x must be {names}", str(x.dtype), "Cast it with .to(dtype)."))
    require(x.ndim >= 1, op, "x must have at least 1 dimension", "a scalar")
    width = x.shape[-1]
    need = f"x must end in a positive multiple of {multiple}"
    require(width > 0 and width % multiple == 0, op, need, f"shape {tuple(x.shape)}")
    return width


def _check_norm(op: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """Refuse what no implementation computes. Raises: ValueError, TypeError."""
    hidden = _check_x(op, x, MULTIPLE)
    require(hidden <= MAX_HIDDEN, op, f"a row must have at most {MAX_HIDDEN} values", str(hidden))
    for name, tensor, shape in (("weight", weight, (hidden,)), ("residual", residual, tuple(x.shape))):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            got, fix = f"x {x.dtype}, {name} {tensor.dtype}", "Cast one of them."
            raise TypeError(message(op, f"x and {name} must have the same dtype", got, fix))
        require(tuple(tensor.shape) == shape, op, f"{name} must have shape {shape}", str(tuple(tensor.shape)))
        require(
            tensor.device == x.device,
            op,
            "all tensors must be on one device",
            f"x on {x.device}, {name} on {tensor.device}",
            "Move one of them.",
        )


def _norm_cpu(x: Tensor, weight: Tensor, eps: float, op: str = _NORM) -> Tensor:
    _check_norm(op, x, None, weight)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def _add_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(_ADD, x, residual, weight)
    total = (x + residual).contiguous()
    return _norm_cpu(total, weight, eps, _ADD), total


def _silu_cpu(x: Tensor) -> Tensor:
    _check_x(_SILU, x, 2 * MULTIPLE)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate.float()).to(x.dtype) * up


def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_norm(_NORM, x, None, weight)
    return x.new_empty(x.shape)


def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(_ADD, x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _silu_fake(x: Tensor) -> Tensor:
    width = _check_x(_SILU, x, 2 * MULTIPLE)
    return x.new_empty((*x.shape[:-1], width // 2))


def _remember(key: tuple[Any, ...], x: Tensor, out_width: int) -> _Call:
    """Plan a checked signature that was not seen before, and load its kernel. key: begins with the operator."""
    from marlin.runtime import rowwise

    width, shape, index = x.shape[-1], (*x.shape[:-1], out_width), x.get_device()
    plan = kernel = None
    if x.numel():
        plan = rowwise.rowwise_plan(key[0], x.numel() // width, out_width, cuda.DTYPE_NAMES[x.dtype], index)
        kernel = rowwise.rowwise_kernel(plan.variant, index)
    if len(_calls) >= _MAX_REMEMBERED:
        _calls.clear()
    call = _calls[key] = _Call(width, shape, torch.empty(shape, device="meta").stride(), plan, kernel)
    return call


def _norm_cuda(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """The norm, and x + residual where there is one, on the current stream of x's device."""
    index = x.get_device()
    if current_device() != index:
        with torch.cuda.device(index):
            return _norm_cuda(op, x, residual, weight, eps)
    key: tuple[Any, ...] = (op, x.shape, x.dtype, index, weight.shape, weight.dtype, weight.get_device())
    if residual is not None:
        key = (*key, residual.shape, residual.dtype, residual.get_device())
    call = _calls.get(key)
    if call is None:
        _check_norm(op, x, residual, weight)
        call = _remember(key, x, x.shape[-1])
    out = empty(call.out_shape, call.out_strides, x.dtype)
    total = None if residual is None else empty(call.out_shape, call.out_strides, x.dtype)
    if call.plan is None:
        return out, total
    x, stride = rows(x, call.width)
    if weight.data_ptr() % 16 or not weight.is_contiguous():
        weight = weight.clone(memory_format=torch.contiguous_format)
    added, added_stride, sums = 0, 0, 0
    if residual is not None and total is not None:
        residual, added_stride = rows(residual, call.width)
        added, sums = residual.data_ptr(), total.data_ptr()
    pointers = (x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), sums)
    call.plan.norm(call.kernel, pointers, (stride, added_stride), eps, raw_stream(index))
    return out, total


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_cuda(_NORM, x, None, weight, eps)[0]


def _add_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], _norm_cuda(_ADD, x, residual, weight, eps))


def _silu_cuda(x: Tensor) -> Tensor:
    index = x.get_device()
    if current_device() != index:
        with torch.cuda.device(index):
            return _silu_cuda(x)
    key = (_SILU, x.shape, x.dtype, index)
    call = _calls.get(key)
    if call is None:
        call = _remember(key, x, _check_x(_SILU, x, 2 * MULTIPLE) // 2)
    out = empty(call.out_shape, call.out_strides, x.dtype)
    if call.plan is not None:
        x, stride = rows(x, call.width)
        call.plan.silu_and_mul(call.kernel, x.data_ptr(), out.data_ptr(), stride, raw_stream(index))
    return out


class _Operator(NamedTuple):
    """Schema, and what runs for device and tracer."""

    schema: str
    cpu: Callable[..., Any]
    cuda: Callable[..., Any]
    fake: Callable[..., Any]


_OPERATORS = {
    _NORM: _Operator("(Tensor x, Tensor weight, float eps) -> Tensor", _norm_cpu, _rms_norm_cuda, _norm_fake),
    _ADD: _Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        _add_norm_cpu,
        _add_norm_cuda,
        _add_norm_fake,
    ),
    _SILU: _Operator("(Tensor x) -> Tensor", _silu_cpu, _silu_cuda, _silu_fake),
}


def _register(library: torch.library.Library) -> None:
    for op, operator in _OPERATORS.items():
        library.define(op + operator.schema)
        library.impl(op, operator.cpu, "CPU")
        library.impl(op, operator.cuda, "CUDA")
        torch.library.register_fake(f"marlin::{op}", operator.fake, lib=library)


_library = torch.library.Library("marlin", "FRAGMENT")
_register(_library)
_overloads = {op: getattr(torch.ops.marlin, op).default for op in _OPERATORS}


def _apply(op: str, *args: Any) -> Any:
    """The operator by the shortest way."""
    x = args[0]
    if is_compiling() or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)):
        return _overloads[op](*args)
    if x.is_cuda and is_plain(x):
        return _OPERATORS[op].cuda(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _overloads[op](*args)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """round(x * rsqrt(mean(x^2) + eps)) * weight along the last dimension.

    Shapes: x [..., H] fp16 or bf16 (float32 on the CPU too), rows may be strided; weight [H], dtype of x; returns
    [..., H], contiguous. H is a multiple of 8, at most 32768.
    Raises: ValueError (shapes, devices), TypeError (dtypes), UnsupportedError (GPU), CompileError, LaunchError.
    """
    return cast(Tensor, _apply(_NORM, x, weight, eps))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of z = x + residual, rounded to their dtype, and z: the residual of what follows.

    Shapes, errors: as `rms_norm`; residual as x.
    """
    return cast(tuple[Tensor, Tensor], _apply(_ADD, x, residual, weight, eps))


def silu_and_mul(x: Tensor) -> Tensor:
    """silu of the first half of the last dimension, rounded to x's dtype, times the second half.

    Shapes: x [..., 2 D] fp16 or bf16 (float32 on the CPU too), D a multiple of 8; returns [..., D], contiguous.
    Raises: as `rms_norm`.
    """
    return cast(Tensor, _apply(_SILU, x))
