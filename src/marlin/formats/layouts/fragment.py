"""The packed layouts `w4a16_sp24` and `w4a16_dense`: bytes in the order in which tensor cores take them.

Owns the fragment order, drawn once, here. One tile is 64 rows (N) by 64 dense columns (K): what one warpgroup of
`wgmma.sp` or four warps of `mma.sp` consume in two (sparse, k-steps of 32) or four (dense, of 16) k-steps. A tile's
bytes are contiguous, so kernels copy tiles and never transpose, and every tensor has N tiles in dimension 0 and K
in dimension 1, so that a cut along either is a slice.

Within a tile, row r and column c belong to

    warp = r / 16    hi = (r % 16) / 8    g = r % 8                        (both)
    step = c / 32    half = (c % 32) / 16    quad = (c % 16) / 4           (sparse: groups of four columns, two kept)
    step = c / 16    half = (c % 16) / 8     quad = (c % 8) / 2            (dense: pairs of columns)

and value v (0 or 1) of the pair goes to

    codes[tile_n, tile_k, (32 * warp + 4 * g + quad) * steps + step]  as code + 8 in nibble 4 * v + 2 * half + hi

which is register `2 * half + hi`, half-word v, of operand A in thread `32 * warp + 4 * g + quad`; nibbles r and
r + 4 sit 16 bits apart so that one mask yields both half-words of register r. The sparse metadata of a pair goes to

    meta[tile_n, tile_k, 32 * warp + 4 * g + 2 * step + half]  as `i0 | i1 << 2` in nibble quad + 4 * hi

which is the metadata register of k-step `step` when that is also the instruction's selector. Scales:

    scales[tile_n, group, 16 * warp + 2 * g + hi]  so that one 32-bit word holds rows g and g + 8.

K is padded to 64 with code 0 (metadata 0b0100), N to 64 with code 0 and scale 0; groups are never padded.
Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32", "Register fragments for wgmma.m64nNk16".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from marlin.errors import message, require
from marlin.formats import int4
from marlin.formats.weight import SCALE_DTYPES, CompressedWeight, DenseInt4Weight, Weight

TILE_N = TILE_K = 64
_PAD_NIBBLE = 0b0100
# Words of int32 per tile: (codes, meta).
TILE_WORDS = {"w4a16_sp24": (256, 128), "w4a16_dense": (512, 0)}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in fragment order. T_n = ceil(N / 64), T_k = ceil(K / 64), G = K / group_size (1 when -1).

    kind: "w4a16_sp24" or "w4a16_dense".
    codes: int32 [T_n, T_k, 256] (sparse) or [T_n, T_k, 512] (dense).
    meta: int32 [T_n, T_k, 128] (sparse), None (dense).
    scales: [T_n, G, 64], float16 or bfloat16 for kernels.
    """

    kind: str
    codes: torch.Tensor
    meta: torch.Tensor | None
    scales: torch.Tensor
    n: int
    k: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        tensors = [t for t in (self.codes, self.meta, self.scales) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def validate(self) -> PackedWeight:
        """Check shapes and dtypes; returns self. Raises: ValueError, TypeError. (Metadata is checked by `unpack`.)"""
        op = f"PackedWeight[{self.kind}]"
        require(self.kind in TILE_WORDS, "PackedWeight", f"kind must be one of {tuple(TILE_WORDS)}", repr(self.kind))
        require(self.n > 0 and self.n % 8 == 0, op, "N must be a positive multiple of 8", f"N={self.n}")
        require(self.k > 0 and self.k % 32 == 0, op, "K must be a positive multiple of 32", f"K={self.k}")
        groups = int4.num_groups(self.k, self.group_size, op)
        tiles = (_ceil_div(self.n, TILE_N), _ceil_div(self.k, TILE_K))
        code_words, meta_words = TILE_WORDS[self.kind]
        require(
            (self.meta is not None) == (meta_words > 0),
            op,
            "meta must be present exactly for 2:4 weights",
            f"meta={'present' if self.meta is not None else 'absent'}",
        )
        expected = {"codes": (*tiles, code_words), "scales": (tiles[0], groups, TILE_N)}
        if meta_words:
            expected["meta"] = (*tiles, meta_words)
        for name, shape in expected.items():
            tensor: torch.Tensor = getattr(self, name)
            require(tuple(tensor.shape) == shape, op, f"{name} must have shape {shape}", str(tuple(tensor.shape)))
            if name != "scales" and tensor.dtype != torch.int32:
                raise TypeError(message(op, f"{name} must be int32", str(tensor.dtype)))
        if self.scales.dtype not in SCALE_DTYPES:
            raise TypeError(message(op, "scales must be float16, bfloat16 or float32", str(self.scales.dtype)))
        return self

    def narrow_n(self, start: int, length: int) -> PackedWeight:
        """Rows start..start+length, without unpacking. Raises: ValueError (not on a tile boundary)."""
        self._check_cut("N", start, length, self.n, TILE_N)
        rows = slice(start // TILE_N, _ceil_div(start + length, TILE_N))
        meta = None if self.meta is None else self.meta[rows]
        return replace(self, codes=self.codes[rows], meta=meta, scales=self.scales[rows], n=length)

    def narrow_k(self, start: int, length: int) -> PackedWeight:
        """Columns start..start+length, without unpacking. Raises: ValueError (not on a tile or group boundary)."""
        self._check_cut("K", start, length, self.k, max(TILE_K, self.group_size))
        columns = slice(start // TILE_K, _ceil_div(start + length, TILE_K))
        meta = None if self.meta is None else self.meta[:, columns]
        scales = self.scales
        if self.group_size != -1:
            scales = scales[:, start // self.group_size : (start + length) // self.group_size]
        return replace(self, codes=self.codes[:, columns], meta=meta, scales=scales, k=length)

    def _check_cut(self, axis: str, start: int, length: int, extent: int, unit: int) -> None:
        end = start + length
        require(
            0 <= start < end <= extent and start % unit == 0 and (end % unit == 0 or end == extent),
            f"PackedWeight.narrow_{axis.lower()}",
            f"a cut along {axis} must lie on multiples of {unit} within {extent}",
            f"start={start}, length={length}",
            "Cut the canonical weight instead (unpack, slice, pack).",
        )


def _pad(tensor: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    pad_rows, pad_columns = rows - tensor.shape[0], columns - tensor.shape[1]
    if not pad_rows and not pad_columns:
        return tensor
    return torch.nn.functional.pad(tensor, (0, pad_columns, 0, pad_rows), value=value)


def _join_nibbles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_or(low, high << 4)


def _pack_codes(codes: torch.Tensor, tiles_n: int, tiles_k: int, steps: int) -> torch.Tensor:
    """codes int8 [N, K/2] (sparse) or [N, K] (dense), padded, to words [T_n, T_k, 128 * steps]."""
    nibbles = (codes + 8).view(torch.uint8).view(tiles_n, 4, 2, 8, tiles_k, steps, 2, 4, 2)
    rows = _join_nibbles(nibbles[:, :, 0], nibbles[:, :, 1])  # [T_n, warp, g, T_k, step, half, quad, v], nibble: hi
    ordered = rows.permute(0, 3, 1, 2, 6, 4, 7, 5).contiguous()  # [T_n, T_k, warp, g, quad, step, v, half]
    return ordered.view(tiles_n, tiles_k, -1).view(torch.int32)


def _unpack_codes(words: torch.Tensor, steps: int) -> torch.Tensor:
    """Inverse of `_pack_codes`: int8 [64 * T_n, T_k * 16 * steps]."""
    tiles_n, tiles_k = words.shape[:2]
    ordered = words.contiguous().view(torch.uint8).view(tiles_n, tiles_k, 4, 8, 4, steps, 2, 2)
    rows = ordered.permute(0, 2, 3, 1, 5, 7, 4, 6)  # [T_n, warp, g, T_k, step, half, quad, v]
    nibbles = torch.stack((rows & 15, rows >> 4), dim=2)
    return nibbles.view(torch.int8).sub_(8).reshape(tiles_n * TILE_N, -1)


def _pack_meta(positions: torch.Tensor, tiles_n: int, tiles_k: int) -> torch.Tensor:
    """positions uint8 [N, K/4], padded, to words [T_n, T_k, 128]."""
    groups = positions.view(tiles_n, 4, 2, 8, tiles_k, 2, 2, 2, 2)  # quad as (byte, nibble)
    pairs = _join_nibbles(groups[..., 0], groups[..., 1])  # [T_n, warp, hi, g, T_k, step, half, byte]
    ordered = pairs.permute(0, 4, 1, 3, 5, 6, 2, 7).contiguous()  # [T_n, T_k, warp, g, step, half, hi, byte]
    return ordered.view(tiles_n, tiles_k, -1).view(torch.int32)


def _unpack_meta(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack_meta`: uint8 [64 * T_n, 16 * T_k]."""
    tiles_n, tiles_k = words.shape[:2]
    ordered = words.contiguous().view(torch.uint8).view(tiles_n, tiles_k, 4, 8, 2, 2, 2, 2)
    pairs = ordered.permute(0, 2, 6, 3, 1, 4, 5, 7)  # [T_n, warp, hi, g, T_k, step, half, byte]
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(tiles_n * TILE_N, -1)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """scales [N, G] to fragment order [T_n, G, 64]; rows beyond N get 0."""
    n, groups = scales.shape
    tiles_n = _ceil_div(n, TILE_N)
    rows = _pad(scales, tiles_n * TILE_N, groups).view(tiles_n, 4, 2, 8, groups)
    return rows.permute(0, 4, 1, 3, 2).reshape(tiles_n, groups, TILE_N).contiguous()


def unpack_scales(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `pack_scales`: [T_n, G, 64] to [N, G]."""
    tiles_n, groups = packed.shape[:2]
    rows = packed.view(tiles_n, groups, 4, 8, 2).permute(0, 2, 4, 3, 1)
    return rows.reshape(tiles_n * TILE_N, groups)[:n].contiguous()


def _magnitudes(scales: torch.Tensor) -> str:
    magnitudes = scales.abs()[scales != 0]
    return f"{float(magnitudes.min()):g}..{float(magnitudes.max()):g}" if magnitudes.numel() else "0"


def pack(weight: Weight, scale_dtype: torch.dtype | None = None) -> PackedWeight:
    """Put a canonical weight into fragment order, on the device where it is.

    scale_dtype: dtype of the packed scales (that of weight.scales when None).
    Raises: ValueError, TypeError (the weight's violated invariant).
    """
    weight.validate()
    scale_dtype = scale_dtype or weight.scales.dtype
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(message("pack", "scale_dtype must be float16, bfloat16 or float32", str(scale_dtype)))
    tiles_n, tiles_k = _ceil_div(weight.n, TILE_N), _ceil_div(weight.k, TILE_K)
    rows, k_padded = tiles_n * TILE_N, tiles_k * TILE_K
    meta = None
    if isinstance(weight, CompressedWeight):
        codes = _pack_codes(_pad(weight.codes, rows, k_padded // 2).contiguous(), tiles_n, tiles_k, 2)
        positions = _pad(weight.positions, rows, k_padded // 4, _PAD_NIBBLE).contiguous()
        meta = _pack_meta(positions, tiles_n, tiles_k)
    else:
        codes = _pack_codes(_pad(weight.codes, rows, k_padded).contiguous(), tiles_n, tiles_k, 4)
    scales = weight.scales.to(scale_dtype)
    require(
        bool((scales.isfinite() & ((scales == 0) == (weight.scales == 0))).all()),
        "pack",
        f"scales must neither overflow nor vanish in {scale_dtype}",
        f"{weight.scales.dtype} in {_magnitudes(weight.scales)}",
        "Pack with scale_dtype=torch.bfloat16, or rescale the weight.",
    )
    return PackedWeight(weight.kind, codes, meta, pack_scales(scales), weight.n, weight.k, weight.group_size)


def unpack(packed: PackedWeight) -> Weight:
    """Exact inverse of `pack`. Raises: ValueError, TypeError (shapes, dtypes, illegal metadata)."""
    packed.validate()
    scales = unpack_scales(packed.scales, packed.n)
    if packed.meta is None:
        codes = _unpack_codes(packed.codes, 4)[: packed.n, : packed.k].contiguous()
        return DenseInt4Weight(codes, scales, packed.group_size).validate()
    codes = _unpack_codes(packed.codes, 2)[: packed.n, : packed.k // 2].contiguous()
    positions = _unpack_meta(packed.meta)[: packed.n, : packed.k // 4].contiguous()
    return CompressedWeight(codes, positions, scales, packed.group_size).validate()
