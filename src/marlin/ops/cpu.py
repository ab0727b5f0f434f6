"""The CPU implementation: exact in fp32, from weights dequantized once. What runs without a GPU."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from marlin.errors import require
from marlin.formats.layouts import PackedWeight, unpack
from marlin.settings import batch_invariant

_Key = tuple[int, int, int, int]
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


class _Entry(NamedTuple):
    dense: Tensor
    packed: tuple[Tensor, ...]
    owner: weakref.ref[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.dense, *self.packed))


class DenseCache:
    """fp32 weights of packed tensors, so that each is dequantized once and not on every call.

    An entry keeps a copy of the packed bytes and serves only while they are equal: every change is seen, whatever
    made it. It goes with the tensor that owns the codes. MARLIN_CPU_CACHE_MB (default 2048) bounds the bytes held; 0
    keeps nothing. When full, entries unused for 30 s make room, and what does not fit is dequantized on each call.
    """

    # Why: layers run in turn, so an LRU without a minimum age would evict each one just before its next use.
    min_idle_seconds = 30.0

    def __init__(self) -> None:
        self._entries: dict[_Key, _Entry] = {}
        self._last_used: dict[_Key, float] = {}
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def dense(self, packed: PackedWeight) -> Tensor:
        """The weight, fp32 [N, K]; not to be changed. Raises: ValueError (illegal metadata, scales not finite)."""
        key = (packed.codes.data_ptr(), packed.n, packed.k, packed.group_size)
        parts = tuple(t for t in (packed.codes, packed.meta, packed.scales) if t is not None)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._last_used[key] = time.monotonic()
        if entry is not None and len(parts) == len(entry.packed) and all(map(_same_bytes, parts, entry.packed)):
            return entry.dense
        self._drop(key)
        dense = unpack(packed).to_dense(torch.float32)
        # Why: a view dies with the call that made it; the tensor below it lives as long as the weight.
        owner = packed.codes if packed.codes._base is None else packed.codes._base
        copies = tuple(t.detach().clone() for t in parts)
        self._insert(key, _Entry(dense, copies, weakref.ref(owner, lambda dead: self._drop(key, dead))))
        return dense

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._last_used.clear()

    def _drop(self, key: _Key, owner: weakref.ref[Tensor] | None = None) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and (owner is None or entry.owner is owner):
                del self._entries[key], self._last_used[key]

    def _insert(self, key: _Key, entry: _Entry) -> None:
        with self._lock:
            now = time.monotonic()
            spare = _limit_bytes() - self.nbytes - entry.nbytes
            for old in sorted(self._last_used, key=self._last_used.__getitem__):
                if spare >= 0 or now - self._last_used[old] < self.min_idle_seconds:
                    break
                spare += self._entries[old].nbytes
                self._drop(old)
            if spare >= 0:
                self._entries[key] = entry
                self._last_used[key] = now


def _limit_bytes() -> int:
    text = os.environ.get("MARLIN_CPU_CACHE_MB", "2048")
    require(text.isdecimal(), "MARLIN_CPU_CACHE_MB", "the limit must be a whole number of MiB", repr(text))
    return int(text) << 20


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    # Why as integers: NaN differs from itself, and -0.0 equals 0.0.
    integer = _INTEGER_OF_SIZE[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(integer), b.view(integer))


cache = DenseCache()


def linear(act: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """act [..., K] times the weight in fp32, bias added in fp32, rounded once to act's dtype: [..., N].

    In batch-invariant mode row by row: matrix products group their additions by the number of rows.
    """
    dense, bias = cache.dense(packed), None if bias is None else bias.float()
    if not batch_invariant():
        return torch.nn.functional.linear(act.float(), dense, bias).to(act.dtype)
    out = act.new_empty((*act.shape[:-1], packed.n))
    for row, to in zip(act.reshape(-1, packed.k), out.view(-1, packed.n), strict=True):
        # Why a copy: where a row lies in memory may decide how it is vectorized.
        to.copy_(torch.nn.functional.linear(row.to(torch.float32, copy=True), dense, bias))
    return out
