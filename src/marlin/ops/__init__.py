"""The operators `marlin::w4a16_sp24` and `marlin::w4a16_dense`: schemas, and what runs for device, tracer, gradient.

    out[..., N] = act[..., K] @ weight[N, K].T (+ bias[N])

with packed tensors as in `marlin.formats.layouts.PackedWeight`. Importing this registers them under
`torch.ops.marlin`, together with `*_out`, which write into a given output, and `dequantize`. Weights are frozen:
gradients reach act and bias. Must not know how weights are compressed, nor which module holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from marlin.errors import message
from marlin.formats.layouts import TILE_WORDS, PackedWeight, unpack
from marlin.ops import cpu, cuda
from marlin.ops.checks import check, check_out
from marlin.ops.cuda import Operands
from marlin.ops.direct import is_compiling, is_plain
from marlin.ops.rowwise import fused_add_rms_norm as fused_add_rms_norm
from marlin.ops.rowwise import rms_norm as rms_norm
from marlin.ops.rowwise import silu_and_mul as silu_and_mul
from marlin.settings import batch_invariant

KINDS = tuple(TILE_WORDS)
_ARGUMENTS = {
    "w4a16_sp24": "Tensor act, Tensor codes, Tensor meta, Tensor scales, Tensor? bias, SymInt n, int group_size",
    "w4a16_dense": "Tensor act, Tensor codes, Tensor scales, Tensor? bias, SymInt n, int group_size",
}
_DEQUANTIZE = (
    "(Tensor codes, Tensor? meta, Tensor scales, SymInt n, SymInt k, int group_size, ScalarType dtype) -> Tensor"
)


def _linear_cpu(op: str, act: Tensor, operands: Operands, n: int, group_size: int) -> Tensor:
    check(op, act, *operands, n, group_size)
    codes, meta, scales, bias = operands
    return cpu.linear(act, PackedWeight(op, codes, meta, scales, n, act.shape[-1], group_size), bias)


def _linear_cpu_out(op: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor) -> None:
    _linear_fake_out(op, act, operands, n, group_size, out)
    out.copy_(_linear_cpu(op, act, operands, n, group_size).view_as(out))


def _linear_cuda_out(op: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor) -> None:
    cuda.linear(op, act, operands, n, group_size, out)


def _linear_fake(op: str, act: Tensor, operands: Operands, n: int, group_size: int) -> Tensor:
    check(op, act, *operands, n, group_size)
    return act.new_empty((*act.shape[:-1], n))


def _linear_fake_out(op: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor) -> None:
    check(op, act, *operands, n, group_size)
    check_out(op, act, n, out)


def _dequantize(
    codes: Tensor, meta: Tensor | None, scales: Tensor, n: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    kind = "w4a16_dense" if meta is None else "w4a16_sp24"
    return unpack(PackedWeight(kind, codes, meta, scales, n, k, group_size)).to_dense(dtype)


def _dequantize_fake(
    codes: Tensor, meta: Tensor | None, scales: Tensor, n: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((n, k), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    act, codes, *meta, scales, bias, n, group_size = inputs
    ctx.save_for_backward(codes, scales, *meta)
    ctx.extents = (n, act.shape[-1], group_size)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, *meta = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_act = grad_bias = None
    if needs[0]:
        # Why fp32 on the CPU: the reference stays exact to one rounding; GPUs accumulate in fp32 anyway.
        dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
        dense = torch.ops.marlin.dequantize(codes, meta[0] if meta else None, scales, *ctx.extents, dtype)
        grad_act = (grad.to(dtype) @ dense).to(grad.dtype)
    if needs[-3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_act, *(None,) * (2 + len(meta)), grad_bias, None, None)


def _with_schema(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """function(op, act, operands, n, group_size, ...) behind the arguments of op's schema."""

    def sparse(act: Tensor, codes: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return function(op, act, (codes, meta, scales, bias), *rest)

    def dense(act: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return function(op, act, (codes, None, scales, bias), *rest)

    return sparse if op == "w4a16_sp24" else dense


def _register(library: torch.library.Library) -> None:
    for op in KINDS:
        library.define(f"{op}({_ARGUMENTS[op]}) -> Tensor")
        library.impl(op, _with_schema(op, _linear_cpu), "CPU")
        library.impl(op, _with_schema(op, cuda.linear), "CUDA")
        torch.library.register_fake(f"marlin::{op}", _with_schema(op, _linear_fake), lib=library)
        torch.library.register_autograd(f"marlin::{op}", _backward, setup_context=_setup_context, lib=library)
        library.define(f"{op}_out({_ARGUMENTS[op]}, Tensor(a!) out) -> ()")
        library.impl(f"{op}_out", _with_schema(op, _linear_cpu_out), "CPU")
        library.impl(f"{op}_out", _with_schema(op, _linear_cuda_out), "CUDA")
        torch.library.register_fake(f"marlin::{op}_out", _with_schema(op, _linear_fake_out), lib=library)
    library.define(f"dequantize{_DEQUANTIZE}")
    library.impl("dequantize", _dequantize, "CPU")
    library.impl("dequantize", _dequantize, "CUDA")
    torch.library.register_fake("marlin::dequantize", _dequantize_fake, lib=library)


_library = torch.library.Library("marlin", "DEF")
_register(_library)
_overloads = {op: getattr(torch.ops.marlin, op).default for op in KINDS}
_out_overloads = {op: getattr(torch.ops.marlin, f"{op}_out").default for op in KINDS}


def _present(operands: Operands) -> tuple[Tensor | None, ...]:
    """The operands as the schema lists them: without meta where there is none."""
    return operands if operands[1] is not None else (operands[0], *operands[2:])


def packed_linear(kind: str, act: Tensor, operands: Operands, n: int, group_size: int) -> Tensor:
    """The operator of `kind` on (codes, meta or None, scales, bias or None), by the shortest way: [..., N].

    Shapes and errors: see `linear`.
    """
    bias = operands[3]
    if is_compiling() or (torch.is_grad_enabled() and (act.requires_grad or (bias is not None and bias.requires_grad))):
        return cast(Tensor, _overloads[kind](act, *_present(operands), n, group_size))
    # Why: going through torch's dispatcher costs more than the launch, and its autograd kernel of a Python operator
    # costs that again; without gradients nothing needs either.
    if act.is_cuda and is_plain(act):
        return cuda.linear(kind, act, operands, n, group_size)
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _overloads[kind](act, *_present(operands), n, group_size))


def packed_linear_out(kind: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor) -> None:
    """`packed_linear` into `out`, contiguous [M, N]. Not differentiable."""
    _out_overloads[kind](act, *_present(operands), n, group_size, out)


def linear(act: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """act @ weight.T (+ bias) for a packed weight, on the device of the tensors.

    Shapes: act [..., K] fp16 or bf16 (float32 on the CPU too), bias [N]; returns [..., N], dtype of act.
    Raises: ValueError (shapes, devices), TypeError (dtypes), UnsupportedError (GPU), CompileError, LaunchError.
    """
    operands = (packed.codes, packed.meta, packed.scales, bias)
    return packed_linear(packed.kind, act, operands, packed.n, packed.group_size)


def linear_out(act: Tensor, packed: PackedWeight, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` into `out`, contiguous [M, N] of act's dtype and device; returns out. Not differentiable."""
    packed_linear_out(
        packed.kind, act, (packed.codes, packed.meta, packed.scales, bias), packed.n, packed.group_size, out
    )
    return out


def describe(kind: str, m: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """Which path computes this product: "cpu reference (fp32)", or kernel and configuration, or expansion and cuBLAS.

    Raises: ValueError, UnsupportedError (no path).
    """
    if kind not in KINDS:
        raise ValueError(message("describe", f"kind must be one of {KINDS}", repr(kind)))
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu reference (fp32)"
    if device.type != "cuda" or dtype not in cuda.DTYPE_NAMES:
        raise ValueError(message("describe", "kernels run fp16 or bf16 on CUDA", f"{dtype} on {device}"))
    from marlin import runtime

    index = torch.cuda.current_device() if device.index is None else device.index
    problem = runtime.Problem(m, n, k, group_size, cuda.DTYPE_NAMES[dtype], kind, batch_invariant())
    return runtime.plan(problem, index).runs


def clear_cpu_cache() -> None:
    """Free the fp32 weights that the CPU implementation keeps; MARLIN_CPU_CACHE_MB bounds them (default 2048)."""
    cpu.cache.clear()
