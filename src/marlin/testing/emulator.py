"""The product from packed bytes, by the register semantics of the instructions that will read them.

Owns a second, independent account of the packed layout: which word a thread loads, what its bits mean as registers,
and to which row and column the instruction assigns each register. It takes a packed weight by its fields and imports
nothing of the packer, so that packer and emulator agree only if both follow the PTX ISA.

A tile is 64 rows (N) by 64 columns (K) and belongs to 128 threads: warp w takes rows 16w..16w+15 as the instruction's
m16. In a warp, lane = 4 g + q: group g = 0..7, place q = 0..3 in the quad. Thread t = 32 w + lane loads

    sparse  words codes[2 t], codes[2 t + 1]     one a k-step of 32, for mma.sp.m16n8k32; metadata word meta[t]
    dense   words codes[4 t] .. codes[4 t + 3]   one a k-step of 16, for mma.m16n8k16
    both    scale word 8 w + g of the group: the low half is the scale of row g, the high half of row g + 8

Register expansion (the kernels' own, both kinds): nibble 4 v + r of a code word, minus 8, times the scale of its row is
half v (0 low, 1 high) of register r. The rest is the instruction's:

    A, mma.m16n8k16     register r holds row g + 8 (r % 2), columns 8 (r / 2) + 2 q + v
                        (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type")
    A, mma.sp.m16n8k32  register r holds row g + 8 (r % 2), the two kept values of columns 16 (r / 2) + 4 q .. + 3
                        (PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types")
    metadata            a nibble `i0 | i1 << 2`, i0 < i1, says which two. The selector names the lanes that supply it:
                        q in {2 sel, 2 sel + 1}, the first for columns 0..15, the second for 16..31; the low half of
                        the word is row g, the high half row g + 8, nibble c of a half is four columns from 4 c
                        (PTX ISA, "Sparse matrix storage"); k-step s of a tile is issued with selector s

The same operands are those of `wgmma.sp` m64 k32 with A in registers. Accumulation is float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from marlin.errors import message, require

_STEPS = {"w4a16_sp24": 2, "w4a16_dense": 4}  # k-steps a tile of 64 columns
_THREADS = 128


def linear(act: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """act @ weight.T + bias from the packed words, in float64 on the CPU.

    Shapes: act [..., K]; packed is a `PackedWeight` [N, K] with float16 or bfloat16 scales; bias [N]; returns
    float64 [..., N].
    Raises: ValueError (K of act, illegal metadata), TypeError (scales that are not 16 bits wide).
    """
    require(act.shape[-1] == packed.k, "emulator", f"act must have K={packed.k} columns", f"{tuple(act.shape)}")
    product = act.cpu().to(torch.float64) @ operand(packed).T
    return product if bias is None else product + bias.cpu().to(torch.float64)


def operand(packed: Any) -> torch.Tensor:
    """What the instructions take as operand A, all tiles side by side without the padding: float64 [N, K].

    Raises: as `linear`.
    """
    codes = packed.codes.cpu()
    tiles_n, tiles_k = codes.shape[:2]
    steps = _STEPS[packed.kind]
    words = codes.reshape(tiles_n, tiles_k, _THREADS, steps, 1, 1)
    register, half = torch.arange(4).view(4, 1), torch.arange(2).view(1, 2)
    values = ((words >> (4 * (4 * half + register))) & 15) - 8  # [tile_n, tile_k, thread, step, register, half]
    scaled = values * _scales(packed).unsqueeze(-1)
    rows, columns = _coordinates(packed)
    if packed.meta is not None:
        columns = columns + _indices(packed, rows, columns)
    else:
        columns = columns + half
    dense = torch.zeros(64 * tiles_n, 64 * tiles_k, dtype=torch.float64)
    dense[rows.expand_as(scaled), columns.expand_as(scaled)] = scaled
    return dense[: packed.n, : packed.k]


def fill_padding(packed: Any, byte: int = 0xFF) -> Any:
    """A copy whose padding (rows from N on, columns from K on: codes, metadata, scales) consists of `byte`.

    Nothing that reads a packed weight may depend on these bits. Runs on the CPU, returns on the device of packed.
    """
    device = packed.codes.device
    pattern = int.from_bytes(bytes([byte] * 4), "little", signed=True)
    rows, columns = _coordinates(packed)
    live = (rows < packed.n) & (columns < packed.k)  # [tile_n, tile_k, thread, step, register, 1]
    nibble = 4 * torch.arange(4).view(4, 1) + 16 * torch.arange(2)
    keep = ((15 << nibble) * live).sum((-2, -1))  # [tile_n, tile_k, thread, step], as the two halves share a row
    result = replace(packed, codes=_blend(packed.codes, keep.flatten(2), pattern).to(device))
    if packed.meta is not None:
        supplier, shift = _metadata_place()
        keep = torch.zeros(*packed.meta.shape, dtype=torch.int64)
        bits = ((15 << shift) * live.squeeze(-1)).flatten(2)
        keep.scatter_add_(2, supplier.flatten().expand_as(bits), bits)
        result = replace(result, meta=_blend(packed.meta, keep, pattern).to(device))
    scales = packed.scales.cpu().contiguous().clone()
    row = _scale_rows(scales.shape[0])
    raw = scales.view(torch.uint8).view(*scales.shape, scales.element_size())
    raw.masked_fill_((row >= packed.n).view(-1, 1, 64, 1), byte)
    return replace(result, scales=scales.to(device))


def _lanes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Warp, group and place in the quad of the tile's 128 threads."""
    thread = torch.arange(_THREADS)
    return thread // 32, thread % 32 // 4, thread % 4


def _coordinates(packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and first column of each register: broadcast over [tile_n, tile_k, thread, step, register, half]."""
    tiles_n, tiles_k = packed.codes.shape[:2]
    steps = _STEPS[packed.kind]
    k_step = 64 // steps
    warp, g, q = (x.view(_THREADS, 1, 1, 1) for x in _lanes())
    tile_n, tile_k = torch.arange(tiles_n).view(-1, 1, 1, 1, 1, 1), torch.arange(tiles_k).view(-1, 1, 1, 1, 1)
    step, register = torch.arange(steps).view(-1, 1, 1), torch.arange(4).view(4, 1)
    rows = 64 * tile_n + 16 * warp + g + 8 * (register % 2)
    # Why: both instructions give register pair r / 2 one half of the k-step, and each quad place a quarter of that.
    columns = 64 * tile_k + k_step * step + k_step // 2 * (register // 2) + k_step // 8 * q
    return rows, columns


def _metadata_place() -> tuple[torch.Tensor, torch.Tensor]:
    """(thread whose word holds it, first bit) of the metadata of [thread, step, register]; the selector is the step."""
    _, _, q = (x.view(_THREADS, 1, 1) for x in _lanes())
    step, register = torch.arange(2).view(2, 1), torch.arange(4)
    supplier = torch.arange(_THREADS).view(_THREADS, 1, 1) - q + 2 * step + register // 2
    return supplier, (4 * q + 16 * (register % 2)).expand_as(supplier)


def _indices(packed: Any, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Place (0..3) of each kept value among its four columns: [tile_n, tile_k, thread, step, register, half]."""
    supplier, shift = _metadata_place()
    words = packed.meta.cpu()[:, :, supplier]
    nibbles = ((words >> shift) & 15).unsqueeze(-1)
    first, second = nibbles & 3, nibbles >> 2
    illegal = (first >= second) & (rows < packed.n) & (columns < packed.k)
    if bool(illegal.any()):
        tile_n, tile_k, thread, step, register, _ = illegal.nonzero()[0].tolist()
        at = f"tile ({tile_n}, {tile_k}), thread {thread}, k-step {step}, register {register}"
        value = int(nibbles[tile_n, tile_k, thread, step, register, 0])
        raise ValueError(
            message("emulator", "metadata nibbles must name two columns in order", f"{value:#06b} for {at}")
        )
    return torch.cat((first, second), dim=-1)


def _scales(packed: Any) -> torch.Tensor:
    """The scale of each register, from the thread's scale word: float64 [tile_n, tile_k, thread, step, register]."""
    scales = packed.scales.cpu().contiguous()
    if scales.element_size() != 2:
        raise TypeError(message("emulator", "scales must be float16 or bfloat16", str(scales.dtype)))
    tiles_k, steps = packed.codes.shape[1], _STEPS[packed.kind]
    warp, g, _ = _lanes()
    words = scales.view(torch.int32)[:, :, 8 * warp + g].unsqueeze(-1)  # [tile_n, group, thread, 1]
    halves = (words >> (16 * (torch.arange(4) % 2))).to(torch.int16)  # keeps the low 16 bits
    values = halves.view(scales.dtype).to(torch.float64)
    first_column = 64 * torch.arange(tiles_k).view(-1, 1) + 64 // steps * torch.arange(steps)
    groups = values.shape[1]
    group = torch.zeros_like(first_column) if packed.group_size == -1 else first_column // packed.group_size
    # Why: the last tile may reach beyond K, where there is no group and activations are zero.
    by_step: torch.Tensor = values[:, group.clamp(max=groups - 1)]
    return by_step.transpose(2, 3)


def _scale_rows(tiles_n: int) -> torch.Tensor:
    """The row of each scale: [tile_n, 64]."""
    place = torch.arange(64)
    row = 16 * (place // 16) + place % 16 // 2 + 8 * (place % 2)
    return 64 * torch.arange(tiles_n).view(-1, 1) + row


def _blend(words: torch.Tensor, keep: torch.Tensor, pattern: int) -> torch.Tensor:
    """words where the bits of keep (int64, the low 32 count) are set, pattern elsewhere."""
    kept = keep.to(torch.int32)
    return ((words.cpu() & kept) | (~kept & pattern)).reshape(words.shape)
