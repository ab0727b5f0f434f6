"""compressed-tensors `pack-quantized`, 4 bits, symmetric: reader, writer, and the config that goes with it.

Owns that format: `weight_packed` int32 [N, ceil(K/8)], code + 8 in nibbles along K, lowest first; `weight_scale`
[N, G]; `weight_shape` int64 [2]. Written weights that are 2:4 hold their zeros as code 0. Knows nothing of files.
Source: compressed-tensors 0.13, whose files the tests read and which reads ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from marlin.formats.published.common import (
    COMPRESS_AGAIN,
    COPY_AGAIN,
    Facts,
    Format,
    check_leaves,
    check_scales,
    check_tensor,
    group_size_of,
    join_nibbles,
    nibbles,
    op_of,
    weight_of_codes,
)
from marlin.formats.safetensors_header import refuse
from marlin.formats.weight import SCALE_DTYPES, Weight


def _check_zero_points(op: str, packed: Tensor, n: int, groups: int) -> None:
    """Zero points int32 [ceil(N/8), G], nibbles along N, must all be that of a symmetric weight."""
    check_tensor(op, "weight_zero_point", packed, (torch.int32,), (-(-n // 8), groups))
    stored = nibbles(packed.t()).flatten(1)[:, :n]
    if bool((stored != 8).any()):
        got = f"weight_zero_point with zero points from {int(stored.min()) - 8} to {int(stored.max()) - 8}"
        raise refuse(op, "quantization must be symmetric (zero points 0)", got, COMPRESS_AGAIN)


def _check_group_index(op: str, index: Tensor, k: int, groups: int) -> None:
    check_tensor(op, "weight_g_idx", index, (torch.int32, torch.int64), (k,))
    unset = bool((index == -1).all())  # Why: written so where groups follow the columns.
    if not unset and not torch.equal(index.long(), torch.arange(k) // (k // groups)):
        need = "groups must follow the columns (no activation reordering by weight_g_idx)"
        raise refuse(op, need, "columns in another order", COMPRESS_AGAIN)


def read_pack_quantized(tensors: Mapping[str, Tensor], facts: Facts, layer: str = "") -> Weight:
    """compressed-tensors `pack-quantized`, bit for bit: a `CompressedWeight` if its zeros are 2:4, else dense INT4.

    tensors: weight_packed int32 [N, ceil(K/8)], weight_scale [N, G], weight_shape int64 or int32 [2]; weight_zero_point
    and weight_g_idx may be there if they say nothing.
    Raises: CheckpointError (missing or extra tensors, dtypes, shapes, group size, zero points, activation reordering).
    """
    op = op_of(PACK_QUANTIZED.name, layer)
    check_leaves(op, tuple(tensors), PACK_QUANTIZED.required, PACK_QUANTIZED.optional)
    packed, scales, shape = (tensors[leaf] for leaf in PACK_QUANTIZED.required)
    check_tensor(op, "weight_shape", shape, (torch.int64, torch.int32), (2,))
    n, k = (int(extent) for extent in shape)
    if n < 1 or k < 1:
        raise refuse(op, "weight_shape must hold N and K, both positive", f"{[n, k]}", COPY_AGAIN)
    if packed.ndim == 2 and packed.shape[1] == -(-k // 4) != -(-k // 8):
        raise refuse(op, "weights must have 4 bits", "8 (weight_packed has K/4 words per row)", COMPRESS_AGAIN)
    check_tensor(op, "weight_packed", packed, (torch.int32,), (n, -(-k // 8)))
    check_tensor(op, "weight_scale", scales, SCALE_DTYPES, (n, -1))
    groups = scales.shape[1]
    group_size = group_size_of(op, k, groups, facts)
    if "weight_zero_point" in tensors:
        _check_zero_points(op, tensors["weight_zero_point"], n, groups)
    if "weight_g_idx" in tensors:
        _check_group_index(op, tensors["weight_g_idx"], k, groups)
    codes = nibbles(packed).flatten(1)[:, :k].view(torch.int8) - 8
    return weight_of_codes(op, codes, scales, group_size)


PACK_QUANTIZED = Format(
    "pack-quantized",
    ("weight_packed", "weight_scale", "weight_shape"),
    ("weight_zero_point", "weight_g_idx"),
    read_pack_quantized,
)


def write_pack_quantized(weight: Weight) -> dict[str, Tensor]:
    """The three tensors of a canonical weight, scales in their own dtype; `read_pack_quantized` is the inverse.

    Raises: ValueError, TypeError (the weight's violated invariant), CheckpointError (scales).
    """
    weight.validate()
    check_scales("write_pack_quantized", weight.scales)
    codes = (weight.dense_codes() + 8).view(torch.uint8)
    return {
        "weight_packed": join_nibbles(codes),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.n, weight.k], dtype=torch.int64),
    }


def _weights_entry(group_size: int) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def describe_pack_quantized(group_sizes: Mapping[str, int], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of layers by name with these group sizes (dense positions, or -1).

    ignore: names of modules that stay as they are. One group size targets all linears that are not ignored; where
    there are several, each group lists its layers.
    """
    sizes = sorted(set(group_sizes.values()), reverse=True)
    groups = {}
    for index, size in enumerate(sizes):
        names = [name for name, own in group_sizes.items() if own == size]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(sizes) == 1 else names,
            "weights": _weights_entry(size),
            "input_activations": None,
            "output_activations": None,
            "format": PACK_QUANTIZED.name,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED.name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
