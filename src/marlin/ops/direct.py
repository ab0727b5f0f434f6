"""The shortest ways past torch: when a call may pass by its dispatcher, memory, streams, rows that kernels read.

Each saves a microsecond or more of a call over its public counterpart, which stands in where torch lacks it. Knows no
operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracing_state = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_profiling = torch._C._autograd._profiler_enabled
is_compiling = torch.compiler.is_compiling


def is_plain(act: Tensor) -> bool:
    """Whether nothing stands between a call on act and its kernel: no subclass, mode, transform, tracer or profiler."""
    return (
        type(act) is Tensor
        and not (act.is_neg() or _dispatch_modes() or _function_modes() or _is_profiling())
        and _transform() is None
        and _tracing_state() is None
    )


def _empty_on_device(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# On the current device.
empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", _empty_on_device
)
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


def rows(act: Tensor, k: int) -> tuple[Tensor, int]:
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
