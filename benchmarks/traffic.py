"""Traffic model: the fewest bytes a problem moves, its arithmetic, and the time below which no kernel goes.

Owns bytes, operations and floors as arithmetic on integers. Knows nothing of devices: ceilings come in as numbers
(measured by `benchmarks.ceilings`).
"""

from __future__ import annotations

from dataclasses import dataclass

from marlin.errors import message

# Bits per weight (dense count) of each operation: values, then 2:4 metadata of 4 bits per group of four.
BITS: dict[str, tuple[float, float]] = {
    "fp16": (16.0, 0.0),
    "fp16_sp24": (8.0, 1.0),
    "w4a16_dense": (4.0, 0.0),
    "w4a16_sp24": (2.0, 1.0),
}
META_BITS = {"w4a16_sp24": 4}
# Why 1.5: the sparse instruction doubles the dense rate while it reads its activations from shared memory at full
# width; filling shared memory costs one part in five at four row blocks a tile, and the pure sparse loop runs at
# 1.9 times the dense library. 0.8 * 1.9 = 1.5.
SPARSE_RATE = 1.5


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do: bytes/s read, bytes/s copied (read + write), dense FLOP/s."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float

    def rate(self, op: str) -> float:
        """Arithmetic ceiling of op, dense-equivalent FLOP/s."""
        return self.flops_per_s * (SPARSE_RATE if op.endswith("sp24") else 1.0)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one product, each input read once and each output written once."""

    weight_bytes: int
    act_bytes: int
    out_bytes: int
    flops: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.act_bytes + self.out_bytes

    def floor_us(self, op: str, ceilings: Ceilings) -> float:
        """The larger of bytes over read bandwidth and operations over the rate of op."""
        return 1e6 * max(self.total_bytes / ceilings.read_bytes_per_s, self.flops / ceilings.rate(op))


def weight_bytes(op: str, n: int, k: int, group_size: int, meta_bits: int | None = None) -> int:
    """Bytes of a weight [N, K] with 16-bit scales, metadata included.

    meta_bits: bits of metadata per group of four, where they are not those of `BITS`. Raises: ValueError (unknown op).
    """
    if op not in BITS:
        raise ValueError(message("benchmarks.traffic", f"op must be one of {tuple(BITS)}", repr(op)))
    values, meta = BITS[op]
    if meta and meta_bits is not None:
        meta = meta_bits / 4
    groups = 0 if op.startswith("fp16") else 1 if group_size == -1 else -(-k // group_size)
    return int(n * k * (values + meta)) // 8 + 2 * n * groups


def traffic(op: str, m: int, n: int, k: int, group_size: int, meta_bits: int | None = None) -> Traffic:
    """Traffic of out[M, N] = act[M, K] @ weight[N, K].T with 16-bit act and out; flops are dense-equivalent."""
    return Traffic(weight_bytes(op, n, k, group_size, meta_bits), 2 * m * k, 2 * m * n, 2 * m * n * k)
