"""The tile configurations of all kernels, and the one statement of which are legal where.

Pure Python: knows shapes and limits, not how kernels are compiled or launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.problem import DTYPES, KINDS, Problem

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo

MAX_M = 65536
MAX_WORKSPACE_BYTES = 64 << 20
GROUP_SIZES = (32, 64, 128, -1)
# Static shared memory of the kernel (`arrived` in sm80_w4a16.cuh, rounded up), and what the driver adds to a block.
_STATIC_SMEM_BYTES, _DRIVER_SMEM_BYTES = 128, 1024


@dataclass(frozen=True)
class TileConfig:
    """Extents of a block's tile and how its warps share it; the names are those of `Tile` in sm80_w4a16.cuh."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int
    warps_k: int
    ctas_per_sm: int

    family = "sm80"
    cluster = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n * self.warps_k

    @property
    def tag(self) -> str:
        """Short name: tile, stages, warps, blocks per multiprocessor."""
        warps = f"{self.warps_m}{self.warps_n}{self.warps_k}"
        return f"{self.block_m}x{self.block_n}x{self.block_k}_s{self.stages}_w{warps}_c{self.ctas_per_sm}"

    def chunk_groups(self, group_size: int) -> int:
        return 1 if group_size == -1 else max(1, self.block_k // group_size)

    def stage_bytes(self, kind: str, group_size: int) -> int:
        tiles = self.block_n // 64 * (self.block_k // 64)
        packed = tiles * (1536 if kind == "w4a16_sp24" else 2048)
        return self.block_m * self.block_k * 2 + packed + self.block_n * self.chunk_groups(group_size) * 2

    def smem_bytes(self, kind: str, group_size: int) -> int:
        """Dynamic shared memory: the ring, and the larger of the reduction and the output staging areas."""
        reduce_bytes = self.block_n * self.warps_m * 32 * self.warps_k if self.warps_k > 1 else 0
        own_fragments = self.block_n // self.warps_n // 16 // self.warps_k
        out_bytes = self.threads // 32 * 8 * own_fragments * 32
        return self.stages * self.stage_bytes(kind, group_size) + max(reduce_bytes, out_bytes)


_CONFIGS = (
    TileConfig(8, 64, 512, 4, 1, 1, 4, 2),
    TileConfig(16, 64, 256, 4, 1, 1, 4, 4),
    TileConfig(16, 128, 256, 6, 1, 2, 4, 1),
    TileConfig(32, 64, 256, 3, 1, 1, 4, 3),
    TileConfig(32, 128, 128, 4, 1, 2, 2, 2),
    TileConfig(64, 128, 64, 4, 1, 4, 1, 2),
    TileConfig(64, 256, 64, 4, 1, 4, 1, 2),
    TileConfig(128, 128, 64, 4, 2, 2, 1, 2),
    TileConfig(128, 256, 64, 5, 2, 4, 1, 1),
)


_CONFIGS_SM90 = (
    WarpgroupConfig(8, 1, 2, 512, 4, 1, 2, 2),
    WarpgroupConfig(8, 1, 4, 512, 4, 1, 2, 2),
    WarpgroupConfig(8, 2, 1, 256, 5, 1, 2, 1),
    WarpgroupConfig(8, 4, 1, 256, 4, 1, 1, 1),
    WarpgroupConfig(16, 1, 2, 512, 3, 1, 2, 2),
    WarpgroupConfig(16, 1, 4, 512, 3, 1, 2, 2),
    WarpgroupConfig(16, 2, 2, 256, 6, 1, 1, 0),
    WarpgroupConfig(16, 2, 1, 256, 4, 1, 2, 1),
    WarpgroupConfig(16, 4, 1, 256, 4, 1, 1, 1),
    WarpgroupConfig(32, 1, 2, 256, 4, 1, 2, 2),
    WarpgroupConfig(32, 2, 2, 256, 4, 1, 1, 0),
    WarpgroupConfig(32, 2, 2, 256, 4, 1, 1, 2),
    WarpgroupConfig(32, 2, 1, 256, 3, 1, 2, 1),
    WarpgroupConfig(64, 2, 2, 256, 3, 1, 1, 0),
    WarpgroupConfig(64, 2, 2, 256, 3, 1, 1, 2),
    WarpgroupConfig(64, 4, 1, 128, 5, 1, 1, 1),
    WarpgroupConfig(128, 2, 1, 128, 4, 1, 1, 2),
    WarpgroupConfig(128, 4, 1, 128, 4, 1, 1, 0),
    WarpgroupConfig(128, 4, 1, 128, 4, 1, 1, 1),
    WarpgroupConfig(128, 4, 1, 128, 4, 1, 1, 2),
)
Config = TileConfig | WarpgroupConfig


def all_configs(kind: str) -> tuple[Config, ...]:
    """The configurations built for a kind, family by family, smallest token tile first."""
    return (*_CONFIGS, *_CONFIGS_SM90)


def why_illegal_problem(problem: Problem) -> str | None:
    """Why no configuration can compute the problem, or None."""
    if problem.kind not in KINDS:
        return f"kind must be one of {KINDS}; got {problem.kind!r}."
    if problem.dtype not in DTYPES:
        return f"dtype must be one of {DTYPES}; got {problem.dtype!r}. Cast the activations."
    if problem.group_size not in GROUP_SIZES:
        return f"group_size must be one of {GROUP_SIZES}; got {problem.group_size}."
    if not 1 <= problem.m <= MAX_M:
        return f"M must lie in 1..{MAX_M}; got M={problem.m}. Split the tokens."
    if problem.n < 8 or problem.n % 8:
        return f"N must be a positive multiple of 8; got N={problem.n}. Pad the rows."
    if problem.k < 32 or problem.k % 32:
        return f"K must be a positive multiple of 32; got K={problem.k}. Pad the columns."
    if problem.group_size > 0 and problem.k % problem.group_size:
        return f"K must be a multiple of group_size={problem.group_size}; got K={problem.k}. Use a smaller group_size."
    return None


def why_illegal(config: Config, problem: Problem, device: DeviceInfo) -> str | None:
    """Why `config` cannot compute `problem` on `device`, in a sentence, or None when it can."""
    reason = why_illegal_problem(problem)
    if reason is not None:
        return reason
    if device.arch < (8, 0):
        return (
            f"the GPU must have compute capability 8.0 or newer; got {device.arch[0]}.{device.arch[1]} ({device.name})."
        )
    if config.family == "sm90" and device.arch != (9, 0):
        return f"{config.tag} needs compute capability 9.0; got {device.arch[0]}.{device.arch[1]} ({device.name})."
    if config.family == "sm90" and problem.k % 64:
        return f"{config.tag} needs K to be a multiple of 64; got K={problem.k}."
    smem = config.smem_bytes(problem.kind, problem.group_size)
    if smem + _STATIC_SMEM_BYTES > device.smem_optin_bytes:
        return (
            f"{config.tag} needs {smem} bytes of shared memory a block; {device.name} gives {device.smem_optin_bytes}."
        )
    if problem.group_size > config.block_k and problem.group_size % config.block_k:
        return f"{config.tag} cannot cut groups of {problem.group_size}."
    return None


def blocks_that_fit(config: Config, problem: Problem, device: DeviceInfo) -> int:
    """Blocks of a legal configuration whose shared memory fits on a multiprocessor, at least 1."""
    block = config.smem_bytes(problem.kind, problem.group_size) + _STATIC_SMEM_BYTES + _DRIVER_SMEM_BYTES
    return max(1, (device.smem_optin_bytes + _DRIVER_SMEM_BYTES) // block)


def resident_blocks(config: Config, problem: Problem, device: DeviceInfo) -> int:
    """Blocks of a legal configuration that run at once on the whole GPU."""
    return device.num_sms * min(config.ctas_per_sm, blocks_that_fit(config, problem, device))
