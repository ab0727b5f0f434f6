"""Sampling text from a causal language model, many rows at once: what the dense model writes for recovery.

Owns what transformers' models are told of rows, drawing tokens, and a cache of keys and values for it: one buffer a
layer, written in place, whose query heads are taken together with the key head that they share. Rows by the thousand
keep a GPU busy although every step is launched from Python. Models that do not look their attention up in transformers'
registry are run with their own cache. Knows nothing of what the text is for.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NAME = "marlin_step"
FREE = -1
# Why not cuDNN's: it makes a plan for every length of the cache, and each step has another.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SYNC_EVERY = 16
_ANSWERS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("transformers.masking_utils", "find_packed_sequence_indices", lambda position_ids: None),
    ("transformers.utils.import_utils", "is_cuda_stream_capturing", lambda: False),
)


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers' models that a row of tokens is one sequence, whose attention is causal and nothing else.

    Why: without a mask they look through the positions for several sequences, which makes the host wait for the device
    at every call; and inside a capture they take a mask as large as the attention, which no call outside has.
    """
    with contextlib.ExitStack() as stack:
        for module, name, value in _ANSWERS:
            found = sys.modules.get(module)
            if hasattr(found, name):
                stack.callback(setattr, found, name, getattr(found, name))
                setattr(found, name, value)
        yield


class _UnfitError(Exception):
    """A layer's attention is more than a softmax over all earlier positions."""


class _Cache:
    """Keys and values of every layer, [B, heads, length, d] each; position: of the token that is computed."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one token a row, in the form of transformers' attention functions.

        Shapes: query [B, H, 1, d], key and value [B, heads, 1, d]; returns [B, 1, H, d].
        """
        if any(more.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
            raise _UnfitError
        rows, heads, _, width = key.shape
        index = int(getattr(module, "layer_idx"))  # noqa: B009
        if index not in self.layers:
            shape = (rows, heads, self.length, width)
            self.layers[index] = (key.new_empty(shape), value.new_empty((*shape[:3], value.shape[-1])))
        keys, values = self.layers[index]
        keys[:, :, self.position], values[:, :, self.position] = key[:, :, 0], value[:, :, 0]
        end = self.position + 1
        shared = query.reshape(rows, heads, -1, width)
        out = nn.functional.scaled_dot_product_attention(shared, keys[:, :, :end], values[:, :, :end], scale=scaling)
        return out.reshape(rows, 1, -1, value.shape[-1]), None


Step = Callable[[torch.Tensor, int], torch.Tensor]


@contextlib.contextmanager
def _in_place(model: Any, length: int) -> Iterator[Step | None]:
    """The step of a model whose attention can be replaced, or None: (ids [B], position) -> logits [B, V]."""
    registry = getattr(sys.modules.get(type(model).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if registry is None or before is None or not getattr(model, "_supports_attention_backend", False):
        yield None
        return
    cache = _Cache(length)

    def step(ids: torch.Tensor, position: int) -> torch.Tensor:
        cache.position = position
        at = torch.full((1, 1), position, dtype=torch.int64, device=ids.device)
        return torch.as_tensor(model(input_ids=ids.unsqueeze(1), position_ids=at, use_cache=False).logits[:, -1])

    registry[NAME] = cache.attend
    config._attn_implementation = NAME
    try:
        yield step
    finally:
        config._attn_implementation = before
        del registry[NAME]


@contextlib.contextmanager
def _own_cache(model: Any) -> Iterator[Step]:
    """The step of any model, with the cache that it makes itself."""
    past: Any = None

    def step(ids: torch.Tensor, position: int) -> torch.Tensor:
        nonlocal past
        out = model(input_ids=ids.unsqueeze(1), past_key_values=past, use_cache=True)
        past = out.past_key_values
        return torch.as_tensor(out.logits[:, -1])

    yield step


@contextlib.contextmanager
def _stepping(model: Any, probe: torch.Tensor, length: int) -> Iterator[Step]:
    """The step for ids [B] at position 0, 1, ...: in place where the model's attention allows it."""
    with sdpa_kernel(KERNELS), one_sequence_a_row(), contextlib.ExitStack() as stack:
        step = stack.enter_context(_in_place(model, length))
        if step is not None:
            try:
                step(probe, 0)
            except _UnfitError:
                step = None
        if step is None:
            stack.close()
            step = stack.enter_context(_own_cache(model))
        yield step


def ends_of(model: Any) -> list[int]:
    """Ids that end a text, by the model's configuration."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [int(found)] if isinstance(found, int) else [int(each) for each in found]
    return []


@torch.no_grad()
def sample(
    model: Any,
    beginnings: torch.Tensor,
    length: int,
    *,
    seed: int,
    temperature: float = 1.0,
    deadline: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Continue beginnings int64 [B, P] to `length` tokens by sampling from model's distribution, on its device.

    A position that holds FREE is drawn like those after the beginning; the first must not be. What follows a token that
    ends a text is drawn evenly from the vocabulary: a new text begins. progress(done, length): tokens a row.
    Returns int64 [B, T] on the CPU, T <= length; shorter when time.monotonic() passes deadline.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    given = beginnings.to(device)
    ends = torch.tensor(ends_of(model), dtype=torch.int64, device=device)
    found = [given[:, 0]]
    with _stepping(model, found[0], length) as step:
        for index in range(1, length):
            scores = step(found[-1], index - 1).float()
            if temperature != 1.0:
                scores = scores / temperature
            # Why: the largest of log p plus Gumbel noise is a draw from p; much faster than torch.multinomial.
            noise = torch.empty_like(scores).exponential_(generator=generator)
            drawn = scores.sub_(noise.log_()).argmax(-1)
            if ends.numel():
                begins = torch.randint(0, scores.shape[1], drawn.shape, generator=generator, device=device)
                drawn = torch.where(torch.isin(found[-1], ends), begins, drawn)
            if index < given.shape[1]:
                drawn = torch.where(given[:, index] == FREE, drawn, given[:, index])
            found.append(drawn)
            if index % SYNC_EVERY == 0:
                if progress is not None:
                    progress(index, length)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if time.monotonic() > deadline:
                    break
    return torch.stack(found, 1).cpu()
