"""A model of how long a configuration takes, in microseconds: what `plan` minimizes and `explain` prints.

Pure Python. The constants are properties of an architecture, not of a shape; each says where it comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from marlin.runtime.config import TileConfig, resident_blocks
from marlin.runtime.problem import Problem

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo


class ArchModel(NamedTuple):
    """Rates of one multiprocessor.

    sparse_k32_cycles, dense_k16_cycles: issue interval of mma.sp.m16n8k32 and mma.m16n8k16 in one of four partitions.
    l2_bytes_per_cycle: what a multiprocessor draws from L2 when all do.
    """

    sparse_k32_cycles: float
    dense_k16_cycles: float
    l2_bytes_per_cycle: float


# Why: 8.6 and 8.9 and 12.0 run fp32 accumulation at half rate; 9.0 and 10.0 reach about 60 % of their own
# instruction's rate through mma.
_ARCH_MODELS = {
    (8, 0): ArchModel(8.0, 8.0, 40.0),
    (8, 6): ArchModel(16.0, 16.0, 40.0),
    (8, 9): ArchModel(16.0, 16.0, 40.0),
    (9, 0): ArchModel(8.2, 6.5, 40.0),
    (10, 0): ArchModel(8.2, 6.5, 40.0),
    (12, 0): ArchModel(16.0, 16.0, 40.0),
}

_LAUNCH_US = 2.0
_CHUNK_LATENCY_CYCLES = 250.0
_REDUCE_US = 1.2
_SPLIT_US = 0.25


def arch_model(arch: tuple[int, int]) -> ArchModel:
    """The model of the newest known architecture that is not newer than `arch`."""
    known = [a for a in _ARCH_MODELS if a <= arch]
    return _ARCH_MODELS[max(known) if known else (8, 0)]


class Geometry(NamedTuple):
    """How tiles and chunks fall on blocks; the integers are those of `Schedule` in schedule.cuh."""

    grid: int
    num_m_tiles: int
    num_n_tiles: int
    num_chunks: int
    num_split_tiles: int
    stripe_chunks: int
    num_whole_tiles: int

    @property
    def local_chunks(self) -> int:
        """Chunks of the busiest block."""
        stripe = self.stripe_chunks if self.num_split_tiles else 0
        return stripe + self.num_whole_tiles * self.num_chunks


def geometry(config: TileConfig, problem: Problem, device: DeviceInfo) -> Geometry:
    """Cut the problem for the blocks that the GPU runs at once."""
    m_tiles, n_tiles = -(-problem.m // config.block_m), -(-problem.n // config.block_n)
    chunks, tiles = -(-problem.k // config.block_k), m_tiles * n_tiles
    grid = min(resident_blocks(config, problem, device), tiles * chunks)
    whole, split = divmod(tiles, grid)
    stripe = max(1, -(-split * chunks // grid))
    return Geometry(grid, m_tiles, n_tiles, chunks, split, stripe, whole)


def cost_us(config: TileConfig, problem: Problem, device: DeviceInfo) -> float:
    """Estimated time of one launch in microseconds, on cold weights."""
    arch, shape = arch_model(device.arch), geometry(config, problem, device)
    sparse = problem.kind == "w4a16_sp24"
    cycles_per_us = device.sm_clock_khz / 1e3
    fragments = config.block_n // 16 * (config.block_k // 32)  # m16 x k32
    mma = fragments * (config.block_m // 8) * (arch.sparse_k32_cycles if sparse else 2 * arch.dense_k16_cycles) / 4
    dequantize = fragments * (20 if sparse else 36) * config.warps_m
    issue = (dequantize + fragments * (config.block_m // 8) * (1.5 if sparse else 2.5)) / 4
    stage = config.stage_bytes(problem.kind, problem.group_size)
    per_chunk = max(mma, issue, stage / arch.l2_bytes_per_cycle) + _CHUNK_LATENCY_CYCLES / config.ctas_per_sm
    busy = per_chunk * shape.local_chunks * config.ctas_per_sm / cycles_per_us
    memory = problem.weight_bytes / device.memory_bytes_per_s * 1e6 * shape_imbalance(shape)
    parts = 0.0
    if shape.num_split_tiles:
        sharing = min(shape.grid, -(-shape.num_chunks // shape.stripe_chunks) + 1)
        part_us = config.block_m * config.block_n * 8 / arch.l2_bytes_per_cycle / cycles_per_us
        parts = _REDUCE_US + _SPLIT_US * sharing + part_us * sharing
    return _LAUNCH_US + max(busy, memory) + parts


def shape_imbalance(shape: Geometry) -> float:
    """Work of the busiest block over the mean."""
    total = shape.num_m_tiles * shape.num_n_tiles * shape.num_chunks
    return shape.local_chunks * shape.grid / total
