"""Functions of tensors that are many small steps: captured once per set of shapes in a CUDA graph, then replayed.

Owns the capture, its buffers and their release. Why: the sweeps treat four columns at a time, and launching their small
kernels takes several times as long as running them. Off the GPU the function is called as it is. Knows nothing of what
the functions compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


class GraphWarning(UserWarning):
    """A function could not be captured and runs step by step, as exact and slower."""


@dataclass
class _Captured:
    inputs: list[torch.Tensor | None]
    graph: Any
    outputs: Tensors

    def __call__(self, *tensors: torch.Tensor | None) -> Tensors:
        for kept, tensor in zip(self.inputs, tensors, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        self.graph.replay()
        return self.outputs


_CAPTURED: dict[Hashable, _Captured] = {}
_REFUSED: set[Any] = set()


def release() -> None:
    """Free all graphs and their buffers."""
    _CAPTURED.clear()
    _REFUSED.clear()


def _capture(function: Callable[..., Tensors], tensors: tuple[torch.Tensor | None, ...], static: Any) -> _Captured:
    inputs = [None if tensor is None else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Why a first run: libraries set themselves up in it, which a capture forbids.
        function(*inputs, **static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs, **static)
    return _Captured(inputs, graph, outputs)


def _warn(error: BaseException) -> None:
    # Why the first: an error inside a capture makes the end of the capture fail too.
    while error.__context__ is not None:
        error = error.__context__
    text = f"compress: a CUDA graph could not be captured ({str(error)[:200]}); going on without"
    warnings.warn(text, GraphWarning, stacklevel=3)


def record(function: Callable[..., Tensors], *tensors: torch.Tensor) -> Callable[..., Tensors] | None:
    """function with tensors of these shapes as a graph, for as long as what is returned lives; None off the GPU, and
    with a warning where it cannot be captured. function may change tensors that outlive it, in the same way each time.
    """
    if tensors[0].device.type != "cuda":
        return None
    try:
        with torch.cuda.device(tensors[0].device):
            return _capture(function, tensors, {})
    except RuntimeError as error:
        _warn(error)
        return None


def replayed(function: Callable[..., Tensors], *tensors: torch.Tensor | None, **static: Hashable) -> Tensors:
    """function(*tensors, **static), which must change no input, read no value on the host and draw no random number.

    What is returned holds until the next call with the same function and shapes: copy what must last.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.device.type != "cuda" or function in _REFUSED:
        return function(*tensors, **static)
    shapes = tuple(None if each is None else (each.shape, each.dtype) for each in tensors)
    key = (function, shapes, tuple(sorted(static.items())), first.device)
    found = _CAPTURED.get(key)
    if found is None:
        try:
            with torch.cuda.device(first.device):
                found = _CAPTURED[key] = _capture(function, tensors, static)
        except RuntimeError as error:
            _REFUSED.add(function)
            _warn(error)
            return function(*tensors, **static)
    return found(*tensors)
