"""Run a plan: load its kernel once per device, then put pointers on a stream. Pointers and ints only."""

from __future__ import annotations

import functools
import os

from marlin.runtime import cache, compiler, driver, tensor_map
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.plan import Plan
from marlin.runtime.problem import Problem
from marlin.runtime.source import Variant

# Whether Hopper kernels may start while the kernel before them ends. They read packed weights before that one has
# ended: weights must not be written by a kernel that lets its successor start early.
PDL = os.environ.get("MARLIN_PDL", "1") != "0"


@functools.cache
def kernel(variant: Variant, arch: str, device_index: int) -> driver.Kernel:
    """The loaded kernel of a variant on a GPU; compiled on first use.

    Raises: CompileError, LaunchError, UnsupportedError.
    """
    target = variant.target(arch)
    assert target is not None, f"{variant.entry} was planned for sm_{arch}"
    cubin = cache.get_cubin(variant.render(), name=variant.entry, arch=target)
    return driver.load_kernel(
        cubin, variant.entry, device_index=device_index, smem_bytes=variant.smem_bytes, signature=variant.signature
    )


def launch(
    plan: Plan,
    *,
    act: int,
    codes: int,
    meta: int,
    scales: int,
    bias: int,
    out: int,
    workspace: int,
    tickets: int,
    lda: int,
    stream: int,
) -> None:
    """Launch on `stream` (0: the default stream). Pointers are device addresses, 0 for none; lda counts elements.

    Raises: LaunchError (the driver's word), and what compiling on first use raises.
    """
    device, problem, shape = plan.device, plan.problem, plan.geometry
    loaded = kernel(plan.variant, compiler.arch_for(device.arch), device.index)
    rest, extents = (bias, out, workspace, tickets), (problem.m, problem.n, problem.k)
    blocks = (shape.grid, 1, 1)
    if isinstance(plan.config, WarpgroupConfig):
        maps = (_act_map(plan, act, lda), *_weight_maps(plan.config, problem, codes, meta, scales))
        args = (*maps, *rest, *extents, *shape[1:])
        loaded.launch(blocks, plan.variant.threads, stream, args, pdl=PDL, cluster=plan.config.cluster)
    else:
        operands = (act, codes, meta, scales, *rest, *extents, lda)
        loaded.launch(blocks, plan.variant.threads, stream, (*operands, *shape[1:]))


def _act_map(plan: Plan, act: int, lda: int) -> bytes:
    """act [M, K] as [K / 64][M][64]."""
    m, k, config = plan.problem.m, plan.problem.k, plan.config
    return tensor_map.encode(
        act, plan.problem.dtype, (64, m, k // 64), (2 * lda, 128), (64, config.block_m, config.block_k // 64)
    )


@functools.lru_cache(maxsize=8192)
def _weight_maps(config: WarpgroupConfig, problem: Problem, codes: int, meta: int, scales: int) -> tuple[bytes, ...]:
    """Codes, metadata and scales in words of 8 bytes, a tile (64 rows of one group) in the innermost dimension."""
    tiles_n, tiles_k = -(-problem.n // 64), problem.k // 64
    groups = 1 if problem.group_size == -1 else problem.k // problem.group_size
    sparse = problem.kind == "w4a16_sp24"

    def words(pointer: int, inner: int, columns: int, box_columns: int) -> bytes:
        strides = (8 * inner, 8 * inner * columns)
        return tensor_map.encode(
            pointer, "uint64", (inner, columns, tiles_n), strides, (inner, box_columns, config.wgs_n)
        )

    code_map = words(codes, 128 if sparse else 256, tiles_k, config.block_k // 64)
    meta_map = words(meta, 64, tiles_k, config.block_k // 64) if sparse else code_map
    return code_map, meta_map, words(scales, 16, groups, config.chunk_groups(problem.group_size))
