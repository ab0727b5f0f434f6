"""A model of how long a configuration takes, in microseconds: what `plan` minimizes and `explain` prints.

Pure Python. The constants are properties of an architecture, not of a shape; each says where it comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from marlin.runtime.config import Config, TileConfig, blocks_that_fit, resident_blocks
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.problem import Problem

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo


class ArchModel(NamedTuple):
    """Rates of one multiprocessor.

    sparse_k32_cycles, dense_k16_cycles: issue interval of mma.sp.m16n8k32 and mma.m16n8k16 in one of four partitions,
    as seen in this kernel. l2_bytes_per_cycle: what a multiprocessor draws from L2. clock_share: sustained over
    nominal clock.
    """

    sparse_k32_cycles: float
    dense_k16_cycles: float
    l2_bytes_per_cycle: float
    clock_share: float


# Why: 8.6, 8.9 and 12.0 run fp32 accumulation at half rate. The row of 9.0, like the constants below, is fitted to
# timings of the tiles on the four layers of a Llama-3.1-8B block at M = 1 to 4096 (NVIDIA H200, CUDA 13.0); against the
# tiles record the root mean square error is 9.5 %, and the choice is on average 2.9 % slower than the best tile. The
# other rows scale it by the published instruction rates.
_ARCH_MODELS = {
    (8, 0): ArchModel(10.0, 10.0, 64.0, 0.9),
    (8, 6): ArchModel(20.0, 20.0, 64.0, 0.9),
    (8, 9): ArchModel(20.0, 20.0, 64.0, 0.9),
    (9, 0): ArchModel(9.5, 6.2, 68.0, 0.845),
    (10, 0): ArchModel(9.5, 6.2, 68.0, 0.845),
    (12, 0): ArchModel(20.0, 20.0, 64.0, 0.9),
}

_LAUNCH_US = 2.1
_REDUCE_US = 2.3  # of a split tile, beside the traffic of its parts
_CHUNK_CYCLES = 267.0  # barrier and first fragments, shared by the blocks of a multiprocessor
_DEQUANTIZE_SLOTS, _COPY_SLOTS, _LDMATRIX_SLOTS = 22.3, 11.4, 1.85  # issue slots of a warp
_MEMORY_SHARE = 0.879  # of the nominal bandwidth that streaming reaches

# The same of sm90_*, where a launch overlaps the one before: fitted to 708 timings of its tiles on the same layers and
# GPU at M = 1 to 4096, among them those of the tiles record and of the GEMM record (against the tiles record: root mean
# square error 8.7 %, the choice on average 0.7 % slower than the best tile).
_REDUCE90_US, _CLUSTER_US, _WAVE_US, _NEXT_TILE_US = 3.32, 0.977, 2.23, 1.10
_JOIN_US = 0.799  # one more warpgroup along K
_AGAIN_US = 0.3  # where a second tile of few tokens reads the weights again
_PART90_US, _STORE_US = 1.096e-5, 4.975e-5  # a byte
_TENSOR90 = 1.025  # cycles of a unit for each token
_UNIT_SLOTS_SPARSE, _UNIT_SLOTS_DENSE = 73.2, 66.0
_UNIT_LATENCY, _CHUNK_LATENCY = 101.5, 426.6  # cycles
_L2_BYTES_PER_CYCLE90, _MEMORY_SHARE90, _CLOCK_SHARE90 = 56.3, 0.857, 0.9


def arch_model(arch: tuple[int, int]) -> ArchModel:
    """The model of the newest known architecture that is not newer than `arch`."""
    known = [a for a in _ARCH_MODELS if a <= arch]
    return _ARCH_MODELS[max(known) if known else (8, 0)]


# Dense fp16 operations of a multiprocessor in a cycle, with fp32 accumulation, at the architecture's full rate
# (NVIDIA's architecture papers). Boards that halve fp32 accumulation (GeForce) reach half of it.
_DENSE_OPS_PER_CYCLE = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}


def dense_ops_per_cycle(arch: tuple[int, int]) -> int:
    """Of the newest known architecture that is not newer than `arch`."""
    known = [a for a in _DENSE_OPS_PER_CYCLE if a <= arch]
    return _DENSE_OPS_PER_CYCLE[max(known) if known else (8, 0)]


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


def geometry(config: Config, problem: Problem, device: DeviceInfo) -> Geometry:
    """Cut the problem for the blocks that the GPU runs at once."""
    m_tiles, n_tiles = -(-problem.m // config.block_m), -(-problem.n // config.block_n)
    chunks, tiles = -(-problem.k // config.block_k), m_tiles * n_tiles
    if config.cluster:
        # Chunks beyond the end of K are zeros: every block of a cluster takes as many.
        stripe = -(-chunks // config.cluster)
        return Geometry(tiles * config.cluster, m_tiles, n_tiles, stripe * config.cluster, tiles, stripe, 0)
    if problem.batch_invariant:
        return Geometry(tiles, m_tiles, n_tiles, chunks, 0, 1, 1)  # a block a tile, which nothing cuts
    grid = min(resident_blocks(config, problem, device), tiles * chunks)
    whole, split = divmod(tiles, grid)
    stripe = max(1, -(-split * chunks // grid))
    return Geometry(grid, m_tiles, n_tiles, chunks, split, stripe, whole)


def cost_us(config: Config, problem: Problem, device: DeviceInfo) -> float:
    """Estimated time of one launch in microseconds, on cold weights."""
    if isinstance(config, TileConfig):
        return _cost_sm80(config, problem, device)
    return _cost_sm90(config, problem, device)


def _cost_sm80(config: TileConfig, problem: Problem, device: DeviceInfo) -> float:
    """Tensor and issue slots add, since the warps of a block pass through dequantization and products together."""
    arch, shape = arch_model(device.arch), geometry(config, problem, device)
    cycles_per_us = device.sm_clock_khz / 1e3 * arch.clock_share
    blocks = resident_blocks(config, problem, device) / device.num_sms
    chunk = _chunk_cycles(config, problem, arch) + _CHUNK_CYCLES / blocks
    stage = config.stage_bytes(problem.kind, problem.group_size) / arch.l2_bytes_per_cycle
    waves = -(-shape.grid // resident_blocks(config, problem, device))
    busy = max(chunk, stage) * shape.local_chunks * waves * blocks / cycles_per_us
    memory = problem.weight_bytes / (device.memory_bytes_per_s * _MEMORY_SHARE) * 1e6 * shape_imbalance(shape)
    parts = 0.0
    if shape.num_split_tiles and shape.stripe_chunks < shape.num_chunks:
        exchange = config.block_m * config.block_n * 8 / arch.l2_bytes_per_cycle / cycles_per_us
        parts = _REDUCE_US + exchange * _sharing(shape)
    return float(_LAUNCH_US + (busy**4 + memory**4) ** 0.25 + parts)


def _cost_sm90(config: WarpgroupConfig, problem: Problem, device: DeviceInfo) -> float:
    """Tensor cores, issue slots, the latency of one warpgroup and the bytes of a stage all overlap, none entirely."""
    shape, sparse = geometry(config, problem, device), problem.kind == "w4a16_sp24"
    groups, units = config.wgs_n * config.wgs_k, config.block_k // (64 if sparse else 32) // config.wgs_k
    fit = min(config.min_blocks, blocks_that_fit(config, problem, device))
    # Blocks beside each other on a multiprocessor, of one kernel: where there are fewer, those of the next kernel.
    beside = min(fit, -(-shape.grid // device.num_sms)) if config.cluster else 1
    waves = -(-shape.grid // (device.num_sms * beside))
    # Rows beyond M are not copied.
    absent = (config.block_m - -(-problem.m // shape.num_m_tiles)) * config.block_k * 2
    stage = (config.stage_bytes(problem.kind, problem.group_size) - absent) / _L2_BYTES_PER_CYCLE90
    terms = (
        beside * groups * units * config.block_m * _TENSOR90,
        beside * groups * units * (_UNIT_SLOTS_SPARSE if sparse else _UNIT_SLOTS_DENSE),
        units * _UNIT_LATENCY + _CHUNK_LATENCY,
        beside * stage,
    )
    chunks = shape.stripe_chunks * waves if config.cluster else shape.local_chunks
    tiles = waves if config.cluster else shape.num_whole_tiles + bool(shape.num_split_tiles)
    tile_bytes = config.block_m * config.block_n * 4
    cycles_per_us = device.sm_clock_khz / 1e3 * _CLOCK_SHARE90
    busy = sum(term**3 for term in terms) ** (1 / 3) * chunks / cycles_per_us + tiles * _STORE_US * tile_bytes
    memory = problem.weight_bytes / (device.memory_bytes_per_s * _MEMORY_SHARE90) * 1e6
    reduce = (waves - 1) * _WAVE_US if config.cluster else (tiles - 1) * _NEXT_TILE_US
    if config.cluster > 1:
        reduce += _CLUSTER_US + _AGAIN_US * (shape.num_m_tiles > 1 and config.block_m < 64)
    elif not config.cluster and shape.num_split_tiles and shape.stripe_chunks < shape.num_chunks:
        reduce += _REDUCE90_US + _PART90_US * _sharing(shape) * tile_bytes
    join = _JOIN_US * (config.wgs_k - 1)
    return float(join + (busy**4 + memory**4) ** 0.25 + reduce)


def _sharing(shape: Geometry) -> int:
    """Blocks that share a split tile, at most."""
    return min(shape.grid, -(-shape.num_chunks // shape.stripe_chunks) + 1)


def _chunk_cycles(config: TileConfig, problem: Problem, arch: ArchModel) -> float:
    """Cycles of one partition for one chunk of one block."""
    sparse = problem.kind == "w4a16_sp24"
    fragments = config.block_n // 16 * (config.block_k // 32)  # m16 x k32
    tensor = fragments * (config.block_m // 8) * (arch.sparse_k32_cycles if sparse else 2 * arch.dense_k16_cycles)
    slots = fragments * (1 if sparse else 2) * config.warps_m * _DEQUANTIZE_SLOTS
    slots += config.block_m * config.block_k * 2 / 512 * _COPY_SLOTS
    slots += config.warps_n * config.block_m / 8 * (config.block_k / 32) * _LDMATRIX_SLOTS
    return (tensor + slots) / 4


def shape_imbalance(shape: Geometry) -> float:
    """Work of the busiest block over the mean."""
    total = shape.num_m_tiles * shape.num_n_tiles * shape.num_chunks
    return shape.local_chunks * shape.grid / total
