"""The table of cases that every implementation of the product is tried on, each with its reason, and random weights.

Owns which extents are worth a try and how inputs are drawn. Knows the canonical weight; knows nothing of tiles or
configs: the extents straddle every power of two up to 512, so that they fall on both sides of any tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from marlin.formats import CompressedWeight, DenseInt4Weight, Weight

KINDS = ("w4a16_sp24", "w4a16_dense")
DTYPES = (torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128, -1)
M_SWEEP = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 512, 1000, 4096)
ODD_N = (8, 72, 200)
ODD_K = (32, 96, 160, 576)

_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Nibbles `i0 | i1 << 2`, i0 < i1: the six ways to keep two of four.
_NIBBLES = tuple(i0 | i1 << 2 for i0 in range(4) for i1 in range(i0 + 1, 4))


@dataclass(frozen=True)
class Case:
    """One product: act [m, k] in dtype by a weight [n, k] of this kind; reason says what it is there for."""

    m: int
    n: int
    k: int
    group_size: int
    dtype: torch.dtype
    kind: str
    reason: str
    bias: bool = False

    @property
    def id(self) -> str:
        """For example `m16-n4096-k4096-g128-fp16-sp24`."""
        group = "row" if self.group_size == -1 else str(self.group_size)
        parts = [f"m{self.m}", f"n{self.n}", f"k{self.k}", f"g{group}", _DTYPE_NAMES[self.dtype], self.kind[6:]]
        return "-".join(parts + ["bias"] * self.bias)

    @property
    def macs(self) -> int:
        """Multiplications of the dense product, a measure of what the case costs."""
        return self.m * self.n * self.k

    def weight(self, device: torch.device | str = "cpu", seed: int = 0) -> Weight:
        """The weight of this case."""
        return random_weight(self.n, self.k, self.group_size, self.kind, dtype=self.dtype, device=device, seed=seed)

    def inputs(
        self, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, Weight, torch.Tensor | None]:
        """(act, weight, bias or None) of this case."""
        act = random_act(self.m, self.k, dtype=self.dtype, device=device, seed=seed + 1)
        bias = random_act(1, self.n, dtype=self.dtype, device=device, seed=seed + 2)[0] if self.bias else None
        return act, self.weight(device, seed), bias


def _generator(device: torch.device | str, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def random_act(
    m: int, k: int, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Standard normal activations [m, k]."""
    return torch.randn(m, k, generator=_generator(device, seed), device=device).to(dtype)


def random_weight(
    n: int,
    k: int,
    group_size: int,
    kind: str = "w4a16_sp24",
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Weight:
    """A weight [n, k] of uniform codes (zeros and -8 among them), uniform positions and scales within a factor of 3.

    dtype: of the scales. Scales are such that the product with standard normal activations is of order 1.
    """
    generator = _generator(device, seed)
    groups = 1 if group_size == -1 else k // group_size
    spread = torch.rand(n, groups, generator=generator, device=device) + 0.5
    scales = (spread / (4 * k**0.5)).to(dtype)
    columns = k // 2 if kind == "w4a16_sp24" else k
    codes = torch.randint(-8, 8, (n, columns), generator=generator, device=device, dtype=torch.int8)
    if kind == "w4a16_dense":
        return DenseInt4Weight(codes, scales, group_size)
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)
    choice = torch.randint(0, 6, (n, k // 4), generator=generator, device=device, dtype=torch.int32)
    return CompressedWeight(codes, nibbles[choice], scales, group_size)


def _variants(
    m: int, n: int, k: int, reason: str, *, group_sizes: tuple[int, ...] = (128,), bias: bool = False
) -> Iterator[Case]:
    for kind in KINDS:
        for dtype in DTYPES:
            for group_size in group_sizes:
                yield Case(m, n, k, group_size, dtype, kind, reason, bias)


def _table() -> Iterator[Case]:
    for m in M_SWEEP:
        yield from _variants(m, 256, 512, "M on both sides of every tile's extent")
    for n in ODD_N:
        for k in ODD_K:
            yield from _variants(17, n, k, "N and K at their smallest and at odd multiples", group_sizes=(32, -1))
    for n, k in ((72, 192), (200, 576), (8, 64)):
        yield from _variants(7, n, k, "odd multiples with groups of one tile", group_sizes=(64,))
    for m in (1, 33):
        yield from _variants(m, 192, 1152, "every group size; K an odd number of 128s", group_sizes=GROUP_SIZES)
    for m in (1, 17, 257):
        yield from _variants(m, 72, 96, "bias, in rows and columns that are padded", group_sizes=(32, -1), bias=True)
    yield from _variants(16, 64, 16384, "one column of tiles and a long K: many parts to add", group_sizes=(128, -1))
    yield from _variants(3, 8192, 128, "a short K: less than the pipeline is deep")
    for m in (1, 16, 64):
        yield from _variants(m, 4096, 4096, "a layer of a language model")
    yield from _variants(1000, 1032, 1056, "large and odd in all three", group_sizes=(32,))
    yield from _variants(512, 2048, 2048, "many tokens, all tiles full", bias=True)


CASES: tuple[Case, ...] = tuple(_table())


def cases(max_macs: int | None = None) -> list[Case]:
    """The table, or the cases of it that cost at most max_macs multiplications."""
    return [case for case in CASES if max_macs is None or case.macs <= max_macs]
