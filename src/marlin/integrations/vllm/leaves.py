"""The tensors of each format that the linear method loads: which dimension is N, which is K, and where cuts may fall.

Owns these facts, and the step from a rank's tensors to packed ones. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marlin.errors import CheckpointError, message
from marlin.formats import Weight, checkpoint, published
from marlin.formats.layouts import TILE_K, TILE_N, TILE_WORDS, PackedWeight, pack
from marlin.formats.low_rank import LowRank

_LEGAL_META = 0x44444444  # positions (0, 1) everywhere
_RUN = 64  # rows of N in a tile of the published orders


class Axis(NamedTuple):
    """One extent of the problem in a tensor: dimension, extent of one step, and entries that a step takes."""

    dim: int
    step: int
    entries: int = 1

    def length(self, extent: int) -> int:
        """Entries that hold `extent`, padded to whole steps."""
        return -(-extent // self.step) * self.entries


class Leaf(NamedTuple):
    """One tensor of a layer. rest: its last dimensions.

    n or k is None where the tensor is the same on every rank that cuts N or K; across: the length of that dimension.
    """

    name: str
    dtype: torch.dtype | None  # None: the dtype of the model
    n: Axis | None
    k: Axis | None
    rest: tuple[int, ...]
    fill: int = 0
    across: int = 1

    @property
    def row_dim(self) -> int:
        """The dimension of N, or the one that stands in its place."""
        if self.n is not None:
            return self.n.dim
        return 0 if self.k is None else 1 - self.k.dim

    def rows(self, extent: int) -> int:
        """Entries along `row_dim` that hold so many rows of the weight."""
        return self.n.length(extent) if self.n else self.across

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape for a weight of n rows and k columns."""
        lengths = {self.row_dim: self.rows(n), 1 - self.row_dim: self.k.length(k) if self.k else self.across}
        return (lengths[0], lengths[1], *self.rest)

    def cut(self, op: str, loaded: Tensor, start: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        """The part of a loaded tensor that begins at row and column `start` and has `shape`.

        Raises: CheckpointError (the tensor lacks it), ValueError (start within a step).
        """
        for axis, extent in ((self.n, start[0]), (self.k, start[1])):
            if axis is None:
                continue
            check_step(op, self.name, axis, extent)
            begin, length = axis.length(extent), shape[axis.dim]
            if loaded.ndim != len(shape) or begin + length > loaded.shape[axis.dim]:
                need = f"{self.name} must hold {begin}..{begin + length} along dimension {axis.dim}"
                raise CheckpointError(message(op, need, f"shape {tuple(loaded.shape)}", "Copy the files again."))
            loaded = loaded.narrow(axis.dim, begin, length)
        if tuple(loaded.shape) != shape:
            need = f"{self.name} must have shape {shape} once cut"
            raise CheckpointError(message(op, need, str(tuple(loaded.shape)), "Copy the files again."))
        if self.dtype is not None and loaded.dtype != self.dtype:
            need = f"{self.name} must be {self.dtype}"
            raise CheckpointError(message(op, need, str(loaded.dtype), "Copy the files again."))
        return loaded


def check_step(op: str, name: str, axis: Axis, extent: int) -> None:
    """Refuse a cut within a step. Raises: ValueError."""
    if extent % axis.step:
        need = f"{name} can be cut at multiples of {axis.step}"
        fix = "Use another tensor-parallel size, or pipeline parallelism."
        raise ValueError(message(op, need, str(extent), fix))


@dataclass(frozen=True)
class Part:
    """What one checkpoint layer gives to a rank: kind, group size (-1: one scale per row), extents on the rank.

    kind: a kind of ours, "weight" (not quantized), or the name of a published format. groups: scales per row in the
    checkpoint, before cutting. low_rank: rank of its correction, 0 without one.
    """

    kind: str
    n: int
    k: int
    group_size: int
    groups: int
    low_rank: int = 0

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The tensors of this kind."""
        # Why: with one scale per row, every rank that cuts K needs all of them.
        scale_k = None if self.group_size == -1 else self.group_size
        return (*_LEAVES[self.kind](scale_k), *_low_rank(self.low_rank))

    def check_cut(self, op: str, along_n: bool, along_k: bool) -> None:
        """Whether a rank's extents lie on steps of every tensor. Raises: ValueError."""
        for leaf in self.leaves:
            if along_n and leaf.n is not None:
                check_step(op, leaf.name, leaf.n, self.n)
            if along_k and leaf.k is not None:
                check_step(op, leaf.name, leaf.k, self.k)


def _ours(kind: str) -> Callable[[int | None], tuple[Leaf, ...]]:
    def leaves(scale_k: int | None) -> tuple[Leaf, ...]:
        n, k = Axis(0, TILE_N), Axis(1, TILE_K)
        code_words, meta_words = TILE_WORDS[kind]
        found = [Leaf("codes", torch.int32, n, k, (code_words,))]
        if meta_words:
            found.append(Leaf("meta", torch.int32, n, k, (meta_words,), _LEGAL_META))
        return (*found, Leaf("scales", None, n, Axis(1, scale_k) if scale_k else None, (TILE_N,)))

    return leaves


def _marlin_24(form: published.Format) -> Callable[[int | None], tuple[Leaf, ...]]:
    words, scales, meta = form.required

    def leaves(scale_k: int | None) -> tuple[Leaf, ...]:
        n, k = Axis(1, _RUN, 2 * _RUN), Axis(0, 32)
        return (
            Leaf(words, torch.int32, n, k, ()),
            Leaf(scales, torch.float16, Axis(1, _RUN, _RUN), Axis(0, scale_k) if scale_k else None, ()),
            Leaf(meta, torch.int16, n, k, (), _LEGAL_META & 0x7FFF),
        )

    return leaves


def _plain(scale_k: int | None) -> tuple[Leaf, ...]:
    return (Leaf("weight", None, Axis(0, 1), Axis(1, 1), ()),)


def _low_rank(rank: int) -> tuple[Leaf, ...]:
    if not rank:
        return ()
    return (
        Leaf(UP, None, Axis(0, 1), None, (), across=rank),
        Leaf(DOWN, None, None, Axis(1, 1), (), across=rank),
    )


PLAIN = "weight"
UP, DOWN = "low_rank_up", "low_rank_down"
_LEAVES: Mapping[str, Callable[[int | None], tuple[Leaf, ...]]] = {
    **{kind: _ours(kind) for kind in TILE_WORDS},
    **{form.name: _marlin_24(form) for form in (published.MARLIN_24, published.GPTQ_MARLIN_24)},
    PLAIN: _plain,
}


def packed_part(op: str, part: Part, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PackedWeight:
    """A rank's tensors of a quantized part as a packed weight with scales of dtype.

    Raises: CheckpointError (illegal metadata, scales not finite), ValueError (scales beyond dtype; a cut that leaves
    one of several groups in a published order).
    """
    if part.kind in TILE_WORDS:
        meta, scales = tensors.get("meta"), tensors["scales"]
        fix = "Scales beyond float16 need --dtype bfloat16; otherwise copy or download the files again."
        checkpoint.check_values(op, meta, scales, fix)
        return PackedWeight(part.kind, tensors["codes"], meta, scales, part.n, part.k, part.group_size).validate()
    return pack(_read_published(op, part, tensors), dtype)


def correction(op: str, tensors: Mapping[str, Tensor]) -> LowRank | None:
    """A rank's part of the low-rank correction, or None without one. Raises: CheckpointError (not finite)."""
    if UP not in tensors:
        return None
    for name in (UP, DOWN):
        if not bool(tensors[name].isfinite().all()):
            got = f"NaN or infinity in {tensors[name].dtype}"
            fix = "Values beyond float16 need --dtype bfloat16; otherwise copy or download the files again."
            raise CheckpointError(message(op, f"{name} must be finite", got, fix))
    return LowRank(tensors[UP], tensors[DOWN])


def _read_published(op: str, part: Part, tensors: Mapping[str, Tensor]) -> Weight:
    """The published order depends on the number of groups, and must be that of the checkpoint, not of the cut."""
    form = next(f for f in (published.MARLIN_24, published.GPTQ_MARLIN_24) if f.name == part.kind)
    most_in_single = 2 if form is published.MARLIN_24 else 1
    groups = 1 if part.group_size == -1 else part.k // part.group_size
    facts = published.Facts((part.group_size,))
    if part.groups <= most_in_single or groups > most_in_single:
        return form.read(tensors, facts, op)
    if groups == 1:
        need = f"a rank must hold at least 2 of the {part.groups} groups of K in {form.name}"
        raise ValueError(message(op, need, f"K={part.k} a rank", "Convert it to our format: marlin convert DIR OUT."))
    # Two of many groups in marlin-24: cut from the grouped order, in which the other format stores two.
    other = published.GPTQ_MARLIN_24
    renamed = dict(zip(other.required, (tensors[leaf] for leaf in form.required), strict=True))
    return other.read(renamed, facts, op)
