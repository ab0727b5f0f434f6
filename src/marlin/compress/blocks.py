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


@dataclass
class InputSums:
    """Hessian sums of a block's linear layers; layers that are given the same tensor share one.

    members: lead layer -> all layers that share its input, in the order of their calls. sums: by lead.
    """

    members: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, HessianSum] = field(default_factory=dict)

    @contextlib.contextmanager
    def collect(self, layers: dict[str, nn.Linear]) -> Iterator[None]:
        """While open, forward passes through these layers are added up."""
        lead_of: dict[str, str] = {}
        last: list[Any] = [None, ""]

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0]
                if name not in lead_of:
                    lead_of[name] = last[1] if inputs is last[0] else name
                    self.members.setdefault(lead_of[name], []).append(name)
                if lead_of[name] == name:
                    last[0], last[1] = inputs, name
                    if name not in self.sums:
                        self.sums[name] = HessianSum(inputs.shape[-1], inputs.device)
                    self.sums[name].add(inputs)

            return add

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
        try:
            yield
        finally:
            last[0] = None
            for handle in handles:
                handle.remove()
