"""Packed layouts: `pack` and its exact inverse `unpack`. The order of the bits is drawn in `fragment`."""

from marlin.formats.layouts.fragment import (
    TILE_K,
    TILE_N,
    TILE_WORDS,
    PackedWeight,
    pack,
    pack_scales,
    unpack,
    unpack_scales,
)

__all__ = ["TILE_K", "TILE_N", "TILE_WORDS", "PackedWeight", "pack", "pack_scales", "unpack", "unpack_scales"]
