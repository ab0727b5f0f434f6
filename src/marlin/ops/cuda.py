"""The CUDA implementation: from tensors to pointers, with as few steps on the host as correctness allows.

Owns: which inputs are copied first, and what calls of one weight remember (checks passed, addresses, plans). Must not
know how a kernel is chosen, compiled or launched: `marlin.runtime` does, and is imported on the first call; nor how an
expanded product is computed: `expanded` does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlin.errors import message
from marlin.ops import expanded
from marlin.ops.checks import check, check_out
from marlin.ops.direct import current_device as _current_device
from marlin.ops.direct import empty as _empty
from marlin.ops.direct import raw_stream as _raw_stream
from marlin.ops.direct import rows as _rows
from marlin.ops.scratch import split_k_memory
from marlin.settings import batch_invariant

# (codes, meta or None, scales, bias or None)
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MAX_REMEMBERED, _MAX_PACKED = 8192, 16


class _Call(NamedTuple):
    """What calls of one signature share.

    pieces: (first row, plan). whole: the plan, where it is one launch that needs no memory.
    """

    k: int
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    pieces: tuple[tuple[int, Any], ...]
    whole: Any
    launch: Callable[..., None]
    freeze: Callable[..., Callable[[], bool]]


class _Weight:
    """Operands that passed their checks, and the calls they passed them for, by shape of act.

    calls: without and with batch-invariant mode. held: a copy of bias, where kernels cannot read the caller's.
    again: launches by plan, act, out and stream, packed when they come a second time; None when they came once.
    """

    __slots__ = ("_bias", "addresses", "again", "calls", "codes", "dtype", "held", "index", "key", "meta", "scales")

    def __init__(self, key: tuple[str, int, int], operands: Operands, index: int, held: Tensor | None) -> None:
        codes, meta, scales, bias = operands
        self.key, self.index, self.dtype, self.held = key, index, scales.dtype, held
        self.calls: tuple[dict[torch.Size, _Call], dict[torch.Size, _Call]] = ({}, {})
        self.again: dict[tuple[int, int, int, int], Callable[[], bool] | None] = {}
        number = id(codes)
        self.codes = weakref.ref(codes, lambda dead: _forget(number, dead))
        self.meta, self.scales, self._bias = _reference(meta), _reference(scales), _reference(bias)
        self.addresses = _addresses((codes, meta, scales, bias if held is None else held))

    @property
    def bias(self) -> Tensor | None:
        """As kernels read it."""
        return self._bias() if self.held is None else self.held

    def is_of(self, operands: Operands, key: tuple[str, int, int]) -> bool:
        """Whether these are the tensors that were checked, where they were then."""
        codes, meta, scales, bias = operands
        return (
            self.codes() is codes
            and self.meta() is meta
            and self.scales() is scales
            and self._bias() is bias
            and self.addresses == _addresses(operands)
            and self.key == key
        )


def _reference(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return _absent if tensor is None else weakref.ref(tensor)


def _absent() -> None:
    return None


# Why by identity: the shapes, dtypes and devices of four tensors take longer to compare than a launch.
_weights: dict[int, _Weight] = {}
_calls: dict[tuple[Any, ...], _Call] = {}


def _forget(number: int, dead: weakref.ref[Tensor]) -> None:
    weight = _weights.get(number)
    if weight is not None and weight.codes is dead:
        del _weights[number]


def _addresses(operands: Operands) -> tuple[int, int, int, int]:
    codes, meta, scales, bias = operands
    return (
        codes.data_ptr(),
        0 if meta is None else meta.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )


def linear(op: str, act: Tensor, operands: Operands, n: int, group_size: int, out: Tensor | None = None) -> Tensor:
    """One product on the current stream of act's device, into `out` when given: [..., N].

    Raises: ValueError, TypeError (see `check`), UnsupportedError, CompileError, LaunchError (see `marlin.runtime`).
    """
    weight, call = _weights.get(id(operands[0])), None
    if weight is not None and act.dtype is weight.dtype and act.get_device() == weight.index:
        call = weight.calls[batch_invariant()].get(act.shape)
    if call is None or weight is None or not weight.is_of(operands, (op, n, group_size)):
        weight, call = _remember(op, act, operands, n, group_size)
    if _current_device() == weight.index:
        return _run(op, weight, call, act, out)
    with torch.cuda.device(weight.index):
        return _run(op, weight, call, act, out)


def _remember(op: str, act: Tensor, operands: Operands, n: int, group_size: int) -> tuple[_Weight, _Call]:
    """The weight and the call of operands that were not met before, or not with such an act: checked and planned."""
    invariant = batch_invariant()
    signature = (op, n, group_size, invariant, act.shape, act.dtype, act.device, *map(_signature, operands))
    call = _calls.get(signature)
    if call is None:
        call = _prepare(op, act, operands, n, group_size)
        if len(_calls) >= _MAX_REMEMBERED:
            _calls.clear()
        _calls[signature] = call
    key, number, bias = (op, n, group_size), id(operands[0]), operands[3]
    weight = _weights.get(number)
    if weight is None or not weight.is_of(operands, key):
        names = ("codes", "meta", "scales")
        at = dict(zip(names, _addresses(operands), strict=False))
        if any(address % 16 for address in at.values()):
            got = ", ".join(f"{name} at {address:#x}" for name, address in at.items())
            raise ValueError(message(op, "packed tensors must start on 16 bytes", got, "Clone them."))
        if bias is not None and (bias.data_ptr() % 16 or not bias.is_contiguous()):
            # Why not kept: the caller's values may change.
            held = bias.clone(memory_format=torch.contiguous_format)
            return _Weight(key, operands, act.get_device(), held), call
        if len(_weights) >= _MAX_REMEMBERED:
            _weights.clear()
        weight = _weights[number] = _Weight(key, operands, act.get_device(), None)
    calls = weight.calls[invariant]
    if len(calls) >= _MAX_REMEMBERED:
        calls.clear()
        weight.again.clear()
    calls[act.shape] = call
    return weight, call


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
        rows, dtype = min(MAX_M, m - start), DTYPE_NAMES[act.dtype]
        problem = runtime.Problem(rows, n, k, group_size, dtype, op, batch_invariant())
        pieces.append((start, runtime.plan(problem, act.get_device())))
    return _call(pieces, (*act.shape[:-1], n), k)


def _call(pieces: list[tuple[int, Any]], shape: tuple[int, ...], k: int) -> _Call:
    from marlin import runtime

    whole = None
    if len(pieces) == 1:
        plan = pieces[0][1]
        whole = None if plan.num_tickets or plan.expansion is not None else plan
    strides = torch.empty(shape, device="meta").stride()
    return _Call(k, shape, strides, tuple(pieces), whole, runtime.launch, runtime.freeze)


def by_plan(plan: Any, act: Tensor, operands: Operands, out: Tensor) -> Tensor:
    """act [M, K] times the weight into out [M, N] by a given `runtime.Plan` of theirs, nothing remembered; returns out.

    For benchmarks and tests of plans that `linear` would not make. Raises: as `linear`.
    """
    op, n, k = plan.problem.kind, plan.problem.n, plan.problem.k
    check(op, act, *operands, n, plan.problem.group_size)
    weight = _Weight((op, n, plan.problem.group_size), operands, act.get_device(), None)
    with torch.cuda.device(weight.index):
        return _run(op, weight, _call([(0, plan)], (*act.shape[:-1], n), k), act, out)


def _run(op: str, weight: _Weight, call: _Call, act: Tensor, out: Tensor | None) -> Tensor:
    """The call on the current device, which is act's."""
    if out is None:
        result = _empty(call.out_shape, call.out_strides, weight.dtype)
        if call.whole is not None and act.is_contiguous():
            # Why beside _launch: what most calls are, in the fewest steps.
            at, to, stream = act.data_ptr(), result.data_ptr(), _raw_stream(weight.index)
            key = (id(call.whole), at, to, stream)  # the call keeps the plan, so that its number is not used again
            again = weight.again.get(key)
            if again is not None and again():
                return result
            if not at % 16:
                _put(call, call.whole, weight, at, to, call.k, stream)
                _keep(call, weight, key)
                return result
    else:
        check_out(op, act, call.out_shape[-1], out)
        result = torch.empty_like(out) if out.data_ptr() % 16 else out
    _launch(weight, call, act, result)
    return result if out is None or result is out else out.copy_(result)


def _keep(call: _Call, weight: _Weight, key: tuple[int, int, int, int]) -> None:
    """Pack a launch that came a second time. Why not the first: addresses that do not come again cost the packing."""
    if key not in weight.again:
        if len(weight.again) >= _MAX_PACKED:
            weight.again.clear()
        weight.again[key] = None
    elif weight.again.get(key) is None:
        (_, act, out, stream), (*packed, bias) = key, weight.addresses
        weight.again[key] = call.freeze(
            call.whole, act=act, weight=tuple(packed), bias=bias, out=out, lda=call.k, stream=stream
        )


def _capture_id(stream: int) -> int:
    """Number of the capture that the current stream is part of, 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    from marlin.runtime.driver import current_capture_id

    return current_capture_id(stream)


def _launch(weight: _Weight, call: _Call, act: Tensor, out: Tensor) -> None:
    """Put every piece on the current stream of the current device, act's."""
    act, lda = _rows(act, call.k)
    stream = _raw_stream(weight.index)
    for start, plan in call.pieces:
        # Why not then: cuBLAS may need an environment variable to be allowed; either way computes the product.
        if plan.expansion is not None and not torch.are_deterministic_algorithms_enabled():
            rows = slice(start, start + plan.problem.m)
            tokens, outputs = act.view(-1, call.k)[rows], out.view(-1, call.out_shape[-1])[rows]
            expanded.product(plan, weight.addresses[:3], tokens, outputs, weight.bias, stream)
            continue
        at, to = act.data_ptr() + 2 * lda * start, out.data_ptr() + 2 * call.out_shape[-1] * start
        if not plan.num_tickets:
            _put(call, plan, weight, at, to, lda, stream)
            continue
        memory = split_k_memory(act.device, stream, _capture_id(stream))
        with memory.lock:
            parts, tickets = memory.reserve(plan.workspace_bytes, plan.num_tickets)
            _put(call, plan, weight, at, to, lda, stream, (parts.data_ptr(), tickets.data_ptr()))


def _put(
    call: _Call, plan: Any, weight: _Weight, act: int, out: int, lda: int, stream: int, shared: tuple[int, int] = (0, 0)
) -> None:
    """One launch. shared: workspace and tickets."""
    codes, meta, scales, bias = weight.addresses
    call.launch(
        plan,
        act=act,
        codes=codes,
        meta=meta,
        scales=scales,
        bias=bias,
        out=out,
        workspace=shared[0],
        tickets=shared[1],
        lda=lda,
        stream=stream,
    )
