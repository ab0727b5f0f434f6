"""`PartsParameter`: one named tensor of a vLLM layer whose parts come from several checkpoint layers.

Owns where each part lies and which slice of a loaded tensor a rank takes. vLLM's loader (`weight_loader_v2` of its
linear layers) says which part is loaded. What a slice means belongs to `leaves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.parameter import PackedvLLMParameter

from marlin.errors import CheckpointError, message
from marlin.integrations.vllm.leaves import Leaf, Part, check_step


class Slot(NamedTuple):
    """Where a part lies in the parameter; checkpoint_shape: that of the tensor in the file, None where it may vary."""

    leaf: Leaf
    part: Part
    offset: int
    shape: tuple[int, ...]
    checkpoint_shape: tuple[int, ...] | None


class PartsParameter(PackedvLLMParameter):
    """The parts of one tensor, one behind the other in flat memory: kinds, group sizes and padding may differ.

    A part without this tensor has no slot; loading it does nothing. starts: first row of each part on this rank, as
    vLLM counts.
    """

    def __init__(self, data: Tensor, weight_loader: Callable[..., None], places: Places) -> None:
        leaf = next(slot.leaf for slot in places.slots if slot is not None)
        # Why packed_dim: that is how vLLM knows that sizes along N are not in rows, and asks us (below).
        super().__init__(
            data=data,
            weight_loader=weight_loader,
            packed_factor=leaf.n.step if leaf.n else 1,
            packed_dim=leaf.row_dim,
            output_dim=leaf.row_dim,
            input_dim=1 - leaf.row_dim,
        )
        self.places = places

    def part(self, index: int) -> Tensor | None:
        """The part's memory in its shape, or None where it has no such tensor."""
        slot = self.places.slots[index]
        if slot is None:
            return None
        return self.data[slot.offset : slot.offset + math.prod(slot.shape)].view(slot.shape)

    def load_part(self, index: int, loaded: Tensor, start: tuple[int, int] = (0, 0), rows: int | None = None) -> None:
        """Copy what begins at row and column `start`; rows: of the loaded part, where fewer than the rank holds.

        Raises: CheckpointError (shape, dtype), ValueError (a cut that this tensor does not allow).
        """
        slot = self.places.slots[index]
        target = self.part(index)
        if slot is None or target is None:
            return
        expected = slot.checkpoint_shape
        if expected is not None and tuple(loaded.shape) != expected:
            need = f"{slot.leaf.name} must have shape {expected}, as config.json says"
            raise CheckpointError(message(self.places.op, need, str(tuple(loaded.shape)), "Copy the files again."))
        if rows is not None:
            target = target.narrow(slot.leaf.row_dim, 0, slot.leaf.rows(rows))
        target.copy_(slot.leaf.cut(self.places.op, loaded, start, tuple(target.shape)))

    def adjust_shard_indexes_for_packing(self, shard_size: int, shard_offset: int) -> tuple[int, int]:
        """Entries of a part of a tensor that is merged in the checkpoint: all where its parts share it.

        Raises: ValueError (parts within a step).
        """
        leaf = next(slot.leaf for slot in self.places.slots if slot is not None)
        if leaf.n is None:
            return leaf.across, 0
        check_step(self.places.op, leaf.name, leaf.n, shard_offset)
        return leaf.rows(shard_size), leaf.rows(shard_offset)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.load_part(0, loaded_weight, (self.tp_rank * self.places.parts[0].n, 0))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.load_part(0, loaded_weight, (0, self.tp_rank * self.places.parts[0].k))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load_rows(loaded_weight, kwargs["shard_offset"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        # Why: ranks beyond the number of key-value heads share them in groups of num_heads.
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        self._load_rows(loaded_weight, kwargs["shard_offset"], rank)

    def _load_rows(self, loaded: Tensor, first_row: int, rank: int) -> None:
        index = self.places.starts.index(first_row)
        self.load_part(index, loaded, (rank * self.places.parts[index].n, 0))


class Places(NamedTuple):
    """The parts of one tensor of a layer, and the flat memory that they take. op: the layer, for errors."""

    op: str
    parts: tuple[Part, ...]
    slots: tuple[Slot | None, ...]
    numel: int

    @property
    def starts(self) -> list[int]:
        """First row of each part on this rank."""
        return [sum(part.n for part in self.parts[:index]) for index in range(len(self.parts))]


def all_places(op: str, parts: Sequence[Part], full: Sequence[tuple[int, int] | None]) -> dict[str, Places]:
    """The places of every tensor of a layer, by name. full: rows and columns of each part in the checkpoint, or None.

    Where parts of one layer have a tensor of one name with different dtypes, they cannot share it; no format does so.
    """
    names = dict.fromkeys(leaf.name for part in parts for leaf in part.leaves)
    found = {}
    for name in names:
        slots: list[Slot | None] = []
        numel = 0
        for part, extents in zip(parts, full, strict=True):
            leaf = next((leaf for leaf in part.leaves if leaf.name == name), None)
            if leaf is None:
                slots.append(None)
                continue
            shape = leaf.shape(part.n, part.k)
            slots.append(Slot(leaf, part, numel, shape, leaf.shape(*extents) if extents else None))
            numel += math.prod(shape)
        found[name] = Places(op, tuple(parts), tuple(slots), numel)
    return found


def new_parameter(places: Places, dtype: torch.dtype, weight_loader: Callable[..., None]) -> PartsParameter:
    """A parameter with legal contents (codes 0 or -8, scales 0) on the current default device."""
    leaf = next(slot.leaf for slot in places.slots if slot is not None)
    data = torch.full((places.numel,), leaf.fill, dtype=leaf.dtype or dtype)
    return PartsParameter(data=data, weight_loader=weight_loader, places=places)
