"""Checkpoints of symmetric INT4 that other tools wrote, read bit for bit; and one of their formats to write.

| format | tensors of a layer | becomes |
|---|---|---|
| compressed-tensors `marlin-24` | weight_packed, scale_packed, meta | 2:4 |
| GPTQ `marlin_24` | B_24, s, B_meta | 2:4 |
| `marlin` | B, s | 2:4 if its zeros are, else dense INT4 |
| compressed-tensors `pack-quantized` (also written) | weight_packed, weight_scale, weight_shape | the same |
| GPTQ | qweight, scales, qzeros, g_idx | the same |
| AWQ | qweight, scales, qzeros | the same |
| compressed-tensors `sparse-24-bitmask` | compressed, bitmask, shape | 2:4 in floating point |

Everything else is refused by name. Orders of bits are drawn in the readers' modules.
"""

from marlin.formats.published.bitmask import SPARSE_24_BITMASK, read_bitmask
from marlin.formats.published.common import Facts, Format
from marlin.formats.published.describe import Described, describe_published
from marlin.formats.published.directory import (
    CONFIG_KEYS,
    PICKLES,
    SIDE_CONFIGS,
    PublishedCheckpoint,
    open_published,
    read_config,
)
from marlin.formats.published.gptq import AWQ, GPTQ, read_awq, read_gptq
from marlin.formats.published.marlin_order import (
    GPTQ_MARLIN_24,
    MARLIN,
    MARLIN_24,
    read_gptq_marlin_24,
    read_marlin,
    read_marlin_24,
)
from marlin.formats.published.pack_quantized import (
    PACK_QUANTIZED,
    describe_pack_quantized,
    read_pack_quantized,
    write_pack_quantized,
)

__all__ = [
    "AWQ",
    "CONFIG_KEYS",
    "GPTQ",
    "GPTQ_MARLIN_24",
    "MARLIN",
    "MARLIN_24",
    "PACK_QUANTIZED",
    "PICKLES",
    "SIDE_CONFIGS",
    "SPARSE_24_BITMASK",
    "Described",
    "Facts",
    "Format",
    "PublishedCheckpoint",
    "describe_pack_quantized",
    "describe_published",
    "open_published",
    "read_awq",
    "read_bitmask",
    "read_config",
    "read_gptq",
    "read_gptq_marlin_24",
    "read_marlin",
    "read_marlin_24",
    "read_pack_quantized",
    "write_pack_quantized",
]
