"""The CUDA implementation: from tensors to pointers, with as few steps on the host as correctness allows.

Owns: which inputs are copied first, and what calls of one signature remember (checks passed, plans). Must not know
how a kernel is chosen, compiled or launched: `marlin.runtime` does, and is imported on the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlin.errors import message
from marlin.ops.checks import check, check_out
from marlin.ops.scratch import split_k_memory

# (codes, meta or None, scales, bias or None)
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MAX_REMEMBERED = 8192


class _Call(NamedTuple):
    """What calls of one signature share; `pieces` are (first row, plan)."""

    k: int
    out_shape: tuple[int, ...]
    pieces: tuple[tuple[int, Any], ...]
    launch: Callable[..., None]


_calls: dict[tuple[Any, ...], _Call] = {}


def linear(op: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor | None = None) -> Tensor:
    """One product on the current stream of act's device, into `out` when given: [..., N].

    Raises: ValueError, TypeError (see `check`), UnsupportedError, CompileError, LaunchError (see `marlin.runtime`).
    """
    key = (op, n, group_size, act.shape, act.dtype, act.device, *map(_signature, operands))
    call = _calls.get(key)
    if call is None:
        call = _calls[key] = _prepare(op, act, operands, n, group_size)
    if out is None:
        result = out = act.new_empty(call.out_shape)
    else:
        check_out(op, act, n, out)
        result = torch.empty_like(out) if out.data_ptr() % 16 else out
    index = act.get_device()
    if torch.cuda.current_device() == index:
        _launch(op, call, act, operands, result)
    else:
        with torch.cuda.device(index):
            _launch(op, call, act, operands, result)
    return out if result is out else out.copy_(result)


def _signature(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())


def _prepare(op: str, act: Tensor, operands: Operands, n: int, group_size: int) -> _Call:
    """Check and plan a signature that was not seen before."""
    from marlin import runtime
    from marlin.runtime.config import MAX_M

    check(op, act, *operands, n, group_size)
    for name, tensor in zip(("codes", "meta", "scales"), operands, strict=False):
        if tensor is not None and not tensor.is_contiguous():
            fix = "Call .contiguous() once, after cutting the packed weight."
            raise ValueError(message(op, f"{name} must be contiguous on CUDA", f"strides {tensor.stride()}", fix))
    k = act.shape[-1]
    m = act.numel() // k
    pieces = []
    for start in range(0, m, MAX_M):
        problem = runtime.Problem(min(MAX_M, m - start), n, k, group_size, DTYPE_NAMES[act.dtype], op)
        pieces.append((start, runtime.plan(problem, act.get_device())))
    if len(_calls) >= _MAX_REMEMBERED:
        _calls.clear()
    return _Call(k, (*act.shape[:-1], n), tuple(pieces), runtime.launch)


def _rows(act: Tensor, k: int) -> tuple[Tensor, int]:
    """act as rows that kernels read (16-byte aligned, last dimension contiguous), copied if need be; their stride."""
    lda = k
    if not act.is_contiguous():
        act = act.reshape(-1, k)
        lda = act.stride(0)
        if act.stride(1) != 1 or lda < k or lda % 8:
            act, lda = act.contiguous(), k
    if act.data_ptr() % 16:
        act, lda = act.clone(memory_format=torch.contiguous_format), k
    return act, lda


def _raw_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def _capture_id(stream: int) -> int:
    """Number of the capture that the current stream is part of, 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    from marlin.runtime.driver import current_capture_id

    return current_capture_id(stream)


def _launch(op: str, call: _Call, act: Tensor, operands: Operands, out: Tensor) -> None:
    """Put every piece on the current stream of the current device, act's."""
    codes, meta, scales, bias = operands
    act, lda = _rows(act, call.k)
    if bias is not None and (bias.data_ptr() % 16 or not bias.is_contiguous()):
        bias = bias.clone(memory_format=torch.contiguous_format)
    pointers = {
        "codes": codes.data_ptr(),
        "meta": 0 if meta is None else meta.data_ptr(),
        "scales": scales.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
    }
    if (pointers["codes"] | pointers["meta"] | pointers["scales"]) % 16:
        got = ", ".join(f"{name} at {pointers[name]:#x}" for name in ("codes", "meta", "scales"))
        raise ValueError(message(op, "packed tensors must start on 16 bytes", got, "Clone them."))
    act_ptr, out_ptr, out_row_bytes = act.data_ptr(), out.data_ptr(), 2 * call.out_shape[-1]
    stream = _raw_stream(act.get_device())
    pointers.update(lda=lda, stream=stream, workspace=0, tickets=0)
    for start, plan in call.pieces:
        pointers["act"] = act_ptr + 2 * lda * start
        pointers["out"] = out_ptr + out_row_bytes * start
        if not plan.num_tickets:
            call.launch(plan, **pointers)
            continue
        memory = split_k_memory(act.device, stream, _capture_id(stream))
        with memory.lock:
            parts, tickets = memory.reserve(plan.workspace_bytes, plan.num_tickets)
            pointers.update(workspace=parts.data_ptr(), tickets=tickets.data_ptr())
            call.launch(plan, **pointers)
