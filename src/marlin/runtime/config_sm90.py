"""The tile configurations of `sm90_w4a16_*`: extents, memory and registers of a block of warpgroups.

Pure Python, like `config`, which owns what is legal where.
"""

from __future__ import annotations

from dataclasses import dataclass

# Shared memory that launches ask for, whose blocks are to have a multiprocessor each: in turn what they need, and more
# than half of what there is (228 KiB, of which a block takes 1 KiB). Why: blocks start beside those of the kernel
# before. With room for two of one kernel some multiprocessors would get two and others none, launch after launch; with
# room for one block alone its weights would wait for the kernel before to end.
WIDE_SMEM_BYTES, NARROW_SMEM_BYTES = 114 << 10, 111 << 10

_BARRIER_BYTES, _TICKET_BYTES, _MAX_OWN_PART_BYTES = 24, 16, 16384


@dataclass(frozen=True)
class WarpgroupConfig:
    """Extents of a block's tile and its warpgroups; the names are those of `Tile90` in sm90_w4a16.cuh.

    ctas_per_sm: blocks a multiprocessor works on at once; min_blocks: that it must have registers for, so that the
    blocks of the next kernel can start beside them. cluster: blocks that share a tile, each with its part of K, and add
    their sums through shared memory; 0: the blocks of the grid share all tiles evenly, and add through the workspace.
    """

    block_m: int
    wgs_n: int
    wgs_k: int
    block_k: int
    stages: int
    ctas_per_sm: int = 1
    min_blocks: int = 1
    cluster: int = 0

    family = "sm90"

    @property
    def block_n(self) -> int:
        return 64 * self.wgs_n

    @property
    def threads(self) -> int:
        return 128 * self.wgs_n * self.wgs_k + (128 if self.block_m >= 128 else 32)

    @property
    def tag(self) -> str:
        """Short name: tile, stages, warpgroups, blocks of a multiprocessor at work and held, of a cluster."""
        groups, blocks = f"{self.wgs_n}{self.wgs_k}", f"{self.ctas_per_sm}{self.min_blocks}{self.cluster}"
        return f"{self.block_m}x{self.block_n}x{self.block_k}_s{self.stages}_g{groups}_c{blocks}"

    def chunk_groups(self, group_size: int) -> int:
        return 1 if group_size == -1 else max(1, self.block_k // group_size)

    def stage_bytes(self, kind: str, group_size: int) -> int:
        """Bytes that a stage is filled with."""
        tiles = self.wgs_n * self.block_k // 64
        packed = tiles * (1536 if kind == "w4a16_sp24" else 2048)
        return self.block_m * self.block_k * 2 + packed + self.wgs_n * self.chunk_groups(group_size) * 128

    def smem_bytes(self, kind: str, group_size: int) -> int:
        """Dynamic shared memory: the ring, the larger of the reduction and the output staging areas, barriers."""
        stage = -(-self.stage_bytes(kind, group_size) // 1024) * 1024
        reduce_bytes = (self.wgs_k - 1) * self.wgs_n * self.block_m * 256
        out_bytes = self.wgs_n * min(self.block_m, 32) * 128
        scratch = max(reduce_bytes, out_bytes)
        parts = 0
        if self.cluster > 1:
            parts = (self.cluster - 1) * -(-self.block_m // 8 // self.cluster) * self.wgs_n * 2048
        parts = parts if parts <= _MAX_OWN_PART_BYTES else 0  # else they lie in the ring
        return self.stages * stage + scratch + parts + self.stages * _BARRIER_BYTES + _TICKET_BYTES
