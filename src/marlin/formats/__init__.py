"""What the bits mean: 2:4 masks, INT4 groups, the canonical weight. Layouts are in `formats.layouts`."""

from marlin.formats.int4 import GROUP_SIZES, expand_scales, group_scales, num_groups, quantize
from marlin.formats.low_rank import LowRank
from marlin.formats.sparsity import is_24, mask_from_positions, positions_from_mask, top2_mask
from marlin.formats.weight import CompressedWeight, DenseInt4Weight, Weight

__all__ = [
    "GROUP_SIZES",
    "CompressedWeight",
    "DenseInt4Weight",
    "LowRank",
    "Weight",
    "expand_scales",
    "group_scales",
    "is_24",
    "mask_from_positions",
    "num_groups",
    "positions_from_mask",
    "quantize",
    "top2_mask",
]
