"""The decoder blocks of a causal language model: where they are, what they are called with, how one is run.

Owns: finding the blocks, recording the calls that reach them (position embeddings, attention masks and so on differ
from block to block in some models), running one block, and summing the inputs of its linear layers. Knows nothing of
recipes, masks or codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from marlin.compress.hessian import HessianSum
from marlin.errors import message, require


@dataclass
class Call:
    """Arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Captured:
    """hidden: inputs of the first block, one [b, T, d] per batch. calls[block][batch]: the rest of the arguments."""

    hidden: list[torch.Tensor]
    calls: list[list[Call]]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost ModuleList that holds the most parameters.

    Raises: ValueError (no ModuleList with linear layers).
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    outer = ""
    for name, module in model.named_modules():
        inside = outer and name.startswith(outer + ".")
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        outer = name
        size = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise ValueError(
            message(
                "compress_model",
                "the model must hold its decoder blocks in a torch.nn.ModuleList with torch.nn.Linear layers",
                type(model).__name__,
                "Load a causal language model with AutoModelForCausalLM.",
            )
        )
    return best[1], best[2]


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block by their name inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def module_device(module: nn.Module) -> torch.device:
    """Device of the module's first parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return torch.device(tensor.device)
    return torch.device("cpu")


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts moved to device; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(to_device(v, device) for v in value)
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


@contextlib.contextmanager
def _recorders(blocks: nn.ModuleList, captured: Captured) -> Iterator[None]:
    """Every block passes its input through and records how it was called."""

    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if index == 0:
                captured.hidden.append(hidden)
            captured.calls[index].append(Call(tuple(args[1:]), rest))
            return torch.as_tensor(hidden)

        return forward

    originals = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            del block.forward
            if original is not None:
                block.forward = original


def capture_calls(model: nn.Module, blocks: nn.ModuleList, token_ids: torch.Tensor, batch: int) -> Captured:
    """What each block is called with for token_ids int64 [S, T], `batch` rows at a time; no block computes anything."""
    captured = Captured([], [[] for _ in blocks])
    base = getattr(model, "base_model", model)
    device = module_device(model)
    with _recorders(blocks, captured), torch.no_grad():
        for start in range(0, token_ids.shape[0], batch):
            base(input_ids=token_ids[start : start + batch].to(device), use_cache=False)
    counts = {len(calls) for calls in captured.calls}
    expected = -(-token_ids.shape[0] // batch)
    require(
        counts == {expected},
        "compress_model",
        "every decoder block must be called once in a forward pass",
        f"{sorted(counts)} calls for {expected} batches",
        "This architecture cannot be walked block by block.",
    )
    return captured


@dataclass
class BlockRunner:
    """Runs one block on its device. autocast: dtype of its matrix products, or None for the model's own."""

    block: nn.Module
    device: torch.device
    autocast: torch.dtype | None

    def __call__(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The block's output for hidden [b, T, d], on hidden's device and in its dtype."""
        enabled = self.autocast is not None
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled):
            args, kwargs = to_device(call.args, self.device), to_device(call.kwargs, self.device)
            out = self.block(hidden.to(self.device), *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).to(hidden)


class _EnoughError(Exception):
    """A forward pass has reached what it was run for."""


def run_until(run: BlockRunner, hidden: torch.Tensor, call: Call) -> torch.Tensor | None:
    """The block's output, or None where one of the hooks below ended the pass."""
    try:
        return run(hidden, call)
    except _EnoughError:
        return None


def shared_inputs(
    run: BlockRunner, layers: dict[str, nn.Linear], hidden: list[torch.Tensor], calls: list[Call]
) -> tuple[list[list[str]], list[str]]:
    """(layers grouped by the tensor that they are given, in the order of their calls; layers never called).

    Runs batches until each layer was called.
    """
    groups: list[list[str]] = []
    missing, last = set(layers), [None]

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in missing:
                missing.discard(name)
                if args[0] is last[0]:
                    groups[-1].append(name)
                else:
                    groups.append([name])
                    last[0] = args[0]

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        for rows, call in zip(hidden, calls, strict=True):
            if missing:
                last[0] = None
                run(rows, call)
    finally:
        for handle in handles:
            handle.remove()
    return groups, [name for name in layers if name in missing]


@contextlib.contextmanager
def recorded_inputs(layers: dict[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, the dict that it gives holds each layer's last input."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = args[0]

        return keep

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class DensePass:
    """A block of the dense model: its outputs, and the inputs of its linear layers by name; one entry per batch."""

    outputs: list[torch.Tensor]
    inputs: list[dict[str, torch.Tensor]]


def run_recorded(
    run: BlockRunner, hidden: torch.Tensor, call: Call, keep_inputs: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(output, inputs of the linear layers by name); they wait where hidden does, shared ones once."""
    with recorded_inputs(linear_layers(run.block) if keep_inputs else {}) as found:
        out = run(hidden, call)
    once = {id(tensor): tensor.to(hidden.device) for tensor in found.values()}
    return out, {name: once[id(tensor)] for name, tensor in found.items()}


def adds_to_output(run: BlockRunner, layer: nn.Linear, hidden: torch.Tensor, call: Call) -> bool:
    """Whether the layer's output is added to the block's output as it is: found out by shifting it by 1."""
    if layer.out_features != hidden.shape[-1]:
        return False
    before = run(hidden, call)
    handle = layer.register_forward_hook(lambda module, args, out: out + 1)
    try:
        shift = (run(hidden, call) - before).float()
    finally:
        handle.remove()
    # Why the mean and a wide bound: 16-bit outputs round the sum.
    return abs(float(shift.mean()) - 1) < 0.01 and float((shift - 1).abs().max()) < 0.5


@dataclass
class InputSums:
    """Sums over the inputs of a block's linear layers.

    sums: Hessian sums by layer. cross: by layer, fp32 [K, K], sum of x y^T with y the layer's input and x the reference
    (the dense model's input at the same token); only where both have the same shape in every batch. tail: the layer
    whose inputs are also summed with what the block's output lacks, fp32 [N, K] in `lack`.
    """

    sums: dict[str, HessianSum] = field(default_factory=dict)
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    tail: str | None = None
    lack: torch.Tensor | None = None
    _reference: dict[str, torch.Tensor] = field(default_factory=dict)
    _uneven: set[str] = field(default_factory=set)
    _last: torch.Tensor | None = None

    @contextlib.contextmanager
    def collect(self, layers: dict[str, nn.Linear]) -> Iterator[None]:
        """While open, inputs of these layers are added up; with one layer that is not the tail, a pass ends there."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0]
                if name == self.tail:
                    self._last = inputs
                if name not in self.sums:
                    self.sums[name] = HessianSum(inputs.shape[-1], inputs.device)
                self.sums[name].add(inputs)
                self._add_cross(name, inputs)
                if len(layers) == 1 and self.tail is None:
                    raise _EnoughError

            return add

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
        try:
            yield
        finally:
            self._last = None
            self._reference = {}
            for handle in handles:
                handle.remove()

    def merge(self, other: InputSums, device: torch.device) -> None:
        """Add the sums over other batches, wherever they are, on this device."""
        for name, theirs in other.sums.items():
            self.sums.setdefault(name, HessianSum(theirs.total.shape[0], device)).merge(theirs)
        for name, cross in other.cross.items():
            mine = self.cross.get(name)
            self.cross[name] = cross.to(device) if mine is None else mine.add_(cross.to(device))
        self._uneven |= other._uneven
        for name in self._uneven:
            self.cross.pop(name, None)
        if other.lack is not None:
            self.lack = other.lack.to(device) if self.lack is None else self.lack.add_(other.lack.to(device))

    def refer(self, inputs: dict[str, torch.Tensor]) -> None:
        """The dense model's inputs of the next batch."""
        self._reference = inputs

    def _add_cross(self, name: str, inputs: torch.Tensor) -> None:
        if not self._reference or name in self._uneven:
            return
        other = self._reference.get(name)
        if other is None or other.shape != inputs.shape:
            self._uneven.add(name)
            self.cross.pop(name, None)
            return
        rows, others = (x.reshape(-1, x.shape[-1]).float() for x in (inputs, other.to(inputs.device)))
        if name not in self.cross:
            self.cross[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.cross[name].addmm_(others.T, rows)

    def add_lack(self, lack: torch.Tensor) -> None:
        """Sum what the block's output [b, T, d] lacked in the last batch with the tail's inputs."""
        assert self._last is not None
        rows = self._last.reshape(-1, self._last.shape[-1]).float()
        missing = lack.to(rows.device).reshape(-1, lack.shape[-1]).float()
        if self.lack is None:
            self.lack = torch.zeros(missing.shape[1], rows.shape[1], device=rows.device)
        self.lack.addmm_(missing.T, rows)
