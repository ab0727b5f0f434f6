"""What every reader of a published format needs: stated facts, tensor checks, nibbles, group sizes, 2:4 detection.

Owns the form in which a layer of another tool is refused (CheckpointError: format and layer, requirement, values, way
out), and the step from dense codes to a canonical weight. Knows nothing of any one format's order of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin.formats import int4, sparsity
from marlin.formats.safetensors_header import refuse
from marlin.formats.weight import K_MULTIPLE, N_MULTIPLE, SCALE_DTYPES, CompressedWeight, DenseInt4Weight, Weight

COMPRESS_AGAIN = "Compress the unquantized model instead: marlin compress MODEL OUT."
COPY_AGAIN = "Copy or download all of the files again."
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Facts:
    """What a config says of all its quantized layers.

    group_sizes: in dense positions, -1 for one scale per row; empty when it says nothing. zero_nibble: what `qzeros`
    holds where the zero point is 8 (GPTQ's first version stores one less).
    """

    group_sizes: tuple[int, ...] = ()
    zero_nibble: int = 8


@dataclass(frozen=True)
class Format:
    """A published format: its name, the tensors that a layer must have and may have, and its reader.

    The first of `required` is the one whose file decides where the layer goes. read: (tensors by leaf, facts, layer).
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], Facts, str], Weight]

    @property
    def leaves(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


def op_of(name: str, layer: str) -> str:
    """The first part of an error of this format and layer."""
    return f"{name}, layer {layer}" if layer else name


def check_leaves(op: str, present: tuple[str, ...], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse a layer with a tensor too few or too many. Raises: CheckpointError."""
    missing = [leaf for leaf in required if leaf not in present]
    if missing:
        need = f"the layer must have tensors {', '.join(required)}"
        raise refuse(op, need, f"no {', '.join(missing)}", COPY_AGAIN)
    extra = [leaf for leaf in present if leaf not in required and leaf not in optional]
    if extra:
        need = f"the layer may only have tensors {', '.join((*required, *optional))}"
        raise refuse(op, need, ", ".join(extra), COMPRESS_AGAIN)


def check_tensor(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape; -1 fits any extent of at least 1. Raises: CheckpointError."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise refuse(op, f"{name} must be {names}", str(tensor.dtype).removeprefix("torch."), COPY_AGAIN)
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(a < 1 or b not in (-1, a) for a, b in zip(got, shape, strict=True)):
        wanted = "[" + ", ".join("*" if extent == -1 else str(extent) for extent in shape) + "]"
        raise refuse(op, f"{name} must have shape {wanted}", str(list(got)), COPY_AGAIN)


def nibbles(words: Tensor) -> Tensor:
    """Nibbles of integer words, lowest first: [..., C] of b bytes to uint8 [..., C, 2 * b]."""
    pairs = words.contiguous().view(torch.uint8).view(*words.shape, words.element_size())
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def join_nibbles(values: Tensor) -> Tensor:
    """Inverse of `nibbles` for int32: uint8 [..., 8 * C], each below 16, to int32 [..., C]."""
    return (values[..., 0::2] | values[..., 1::2] << 4).contiguous().view(torch.int32)


def group_size_of(op: str, k: int, groups: int, facts: Facts) -> int:
    """The group size that `groups` scales per row mean, and the config must state as well.

    One scale per row is -1, unless the config names a group size that is all of K.
    Raises: CheckpointError (K not divided evenly, a size that no kernel has, another size in the config).
    """
    if groups < 1 or k % groups:
        need = "groups must have equal sizes along K"
        raise refuse(op, need, f"K={k} with {groups} scales per row", COMPRESS_AGAIN)
    size = k // groups
    if groups > 1 and size not in int4.GROUP_SIZES:
        need = "group_size must be 32, 64, 128 or all of K"
        raise refuse(op, need, f"group_size={size} (K={k})", COMPRESS_AGAIN)
    meant = {size, -1} if groups == 1 else {size}
    if facts.group_sizes and not meant & set(facts.group_sizes):
        stated = ", ".join(map(str, facts.group_sizes))
        need = "tensors and config must have the same group_size"
        raise refuse(op, need, f"{size} in the tensors, {stated} in the config", COPY_AGAIN)
    named = size in facts.group_sizes and -1 not in facts.group_sizes and size in int4.GROUP_SIZES
    return size if groups > 1 or named else -1


def check_extent(op: str, n: int, k: int) -> None:
    """Refuse extents that the packed layout does not have. Raises: CheckpointError."""
    if n % N_MULTIPLE or k % K_MULTIPLE:
        need = f"N must be a multiple of {N_MULTIPLE} and K of {K_MULTIPLE}"
        raise refuse(op, need, f"N={n}, K={k}", "Leave this layer dense: compress the unquantized model with a rule.")


def check_scales(op: str, scales: Tensor) -> None:
    """Refuse scales that are no floating-point numbers. Raises: CheckpointError."""
    if scales.dtype not in SCALE_DTYPES:
        raise refuse(op, "scales must be float16, bfloat16 or float32", str(scales.dtype), COMPRESS_AGAIN)
    if not bool(scales.isfinite().all()):
        raise refuse(op, "scales must be finite", f"NaN or infinity in {scales.dtype}", COPY_AGAIN)


def _position_table(device: torch.device) -> Tensor:
    """Position nibble of each set of non-zeros among four (bit i: column i), filled up from the lowest columns."""
    table = []
    for bits in range(16):
        kept = [i for i in range(4) if bits >> i & 1]
        free = [i for i in range(4) if i not in kept]
        first, *rest = sorted(kept + free[: max(0, 2 - len(kept))])
        table.append(first | rest[0] << 2 if len(rest) == 1 else 0)
    return torch.tensor(table, dtype=torch.uint8, device=device)


def _positions_of_nonzeros(codes: Tensor) -> Tensor | None:
    """uint8 [N, K/4], or None where four codes hold more than two non-zeros."""
    ones = (codes != 0).view(torch.uint8).view(codes.shape[0], -1, 4)
    bits = ones[..., 0] | ones[..., 1] << 1 | ones[..., 2] << 2 | ones[..., 3] << 3
    positions = _position_table(codes.device)[bits.long()]
    return positions if bool(positions.all()) else None


def weight_of_codes(op: str, codes: Tensor, scales: Tensor, group_size: int) -> Weight:
    """A 2:4 weight where no four codes have more than two non-zeros, else a dense INT4 weight.

    Shapes: codes int8 [N, K], -8..7; scales [N, G]. Raises: CheckpointError (extents, scales).
    """
    check_extent(op, *codes.shape)
    check_scales(op, scales)
    kept, places = [], []
    for rows in codes.split(_ROWS_AT_ONCE):  # Why: column indices take 32 bytes for a byte of packed codes.
        positions = _positions_of_nonzeros(rows)
        if positions is None:
            return DenseInt4Weight(codes.contiguous(), scales.contiguous(), group_size).validate()
        kept.append(rows.gather(1, sparsity.kept_columns(positions)))
        places.append(positions)
    return CompressedWeight(torch.cat(kept), torch.cat(places), scales.contiguous(), group_size).validate()
