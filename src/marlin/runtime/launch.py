"""Run a plan: load its kernel once per device, then put pointers on a stream. Pointers and ints only.

Owns what calls of one plan share (kernel, descriptions for the copy engine), so that a call does little on the host.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from marlin.runtime import cache, compiler, loaded, tensor_map
from marlin.runtime.config_sm90 import NARROW_SMEM_BYTES, WIDE_SMEM_BYTES
from marlin.runtime.expansion import TILE, ExpandVariant, Slab, grid
from marlin.runtime.plan import Plan
from marlin.runtime.source import Variant

# Whether Hopper kernels may start while the kernel before them ends. They read packed weights before that one has
# ended: weights must not be written by a kernel that lets its successor start early.
PDL = os.environ.get("MARLIN_PDL", "1") != "0"
_MAX_LAUNCHERS, _MAX_MAPS = 8192, 4096


@functools.cache
def kernel(variant: Variant, arch: str, device_index: int) -> loaded.Kernel:
    """The loaded kernel of a variant on a GPU; compiled on first use.

    Raises: CompileError, LaunchError, UnsupportedError.
    """
    target = variant.target(arch)
    assert target is not None, f"{variant.entry} was planned for sm_{arch}"
    hopper = variant.config.family == "sm90"
    cubin = cache.get_cubin(variant.render(), name=variant.entry, arch=target)
    return loaded.load_kernel(
        cubin,
        variant.entry,
        device_index=device_index,
        smem_bytes=max(variant.smem_bytes, WIDE_SMEM_BYTES) if hopper else variant.smem_bytes,
        signature=variant.signature,
        most_smem=hopper,
    )


class _Launcher:
    """A plan with its kernel loaded, and the descriptions of tensors that its calls have used."""

    def __init__(self, plan: Plan) -> None:
        device, problem, config = plan.device, plan.problem, plan.config
        self.plan = plan
        self.kernel = kernel(plan.variant, compiler.arch_for(device.arch), device.index)
        self.blocks, self.threads = (plan.geometry.grid, 1, 1), plan.variant.threads
        self.extents, self.schedule = (problem.m, problem.n, problem.k), tuple(plan.geometry[1:])
        self.mapped, self.cluster = config.family == "sm90", config.cluster
        tail = problem.m - (plan.geometry.num_m_tiles - 1) * config.block_m
        self.tail_rows = -(-tail // 8) * 8
        self.smem = plan.variant.smem_bytes
        self.takes_turns = self.mapped and plan.geometry.grid <= device.num_sms and self.smem <= NARROW_SMEM_BYTES
        self.act_maps: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self.weight_maps: dict[tuple[int, int, int], tuple[bytes, bytes, bytes]] = {}

    def act_map(self, act: int, lda: int) -> tuple[bytes, bytes]:
        """act [M, K] as [K / 64][M][64], in boxes of a token tile and of the last one."""
        found = self.act_maps.get((act, lda))
        if found is None:
            if len(self.act_maps) >= _MAX_MAPS:
                self.act_maps.clear()
            (m, _, k), config, dtype = self.extents, self.plan.config, self.plan.problem.dtype
            extents, strides, depth = (64, m, k // 64), (2 * lda, 128), config.block_k // 64
            full, tail = ((64, rows, depth) for rows in (config.block_m, self.tail_rows))
            maps = [tensor_map.encode(act, dtype, extents, strides, box) for box in (full, tail)]
            found = self.act_maps[act, lda] = (maps[0], maps[1])
        return found

    def weight_map(self, codes: int, meta: int, scales: int) -> tuple[bytes, bytes, bytes]:
        """Codes, metadata and scales in words of 8 bytes, a tile (64 rows of one group) in the innermost dimension."""
        found = self.weight_maps.get((codes, meta, scales))
        if found is None:
            if len(self.weight_maps) >= _MAX_MAPS:
                self.weight_maps.clear()
            found = self.weight_maps[codes, meta, scales] = _weight_maps(self.plan, codes, meta, scales)
        return found


def _weight_maps(plan: Plan, codes: int, meta: int, scales: int) -> tuple[bytes, bytes, bytes]:
    problem, config = plan.problem, plan.config
    tiles_n, tiles_k = -(-problem.n // 64), problem.k // 64
    groups = 1 if problem.group_size == -1 else problem.k // problem.group_size
    sparse = problem.kind == "w4a16_sp24"

    def words(pointer: int, inner: int, columns: int, box_columns: int) -> bytes:
        strides, box = (8 * inner, 8 * inner * columns), (inner, box_columns, config.block_n // 64)
        return tensor_map.encode(pointer, "uint64", (inner, columns, tiles_n), strides, box)

    code_map = words(codes, 128 if sparse else 256, tiles_k, config.block_k // 64)
    meta_map = words(meta, 64, tiles_k, config.block_k // 64) if sparse else code_map
    return code_map, meta_map, words(scales, 16, groups, config.chunk_groups(problem.group_size))


def _arguments(
    found: _Launcher, act: int, weight: tuple[int, int, int], rest: tuple[int, int, int, int], lda: int
) -> tuple[Any, ...]:
    """Of the kernel. weight: codes, meta, scales; rest: bias, out, workspace, tickets."""
    if not found.mapped:
        return (act, *weight, *rest, *found.extents, lda, *found.schedule)
    maps = (*found.act_map(act, lda), *found.weight_map(*weight))
    return (*maps, *rest, *found.extents, found.tail_rows, *found.schedule)


# Why by identity: hashing a plan takes longer than launching it. The plan is kept, so its number is not used again.
_launchers: dict[int, _Launcher] = {}
_wide = False  # whether the launch before asked for WIDE_SMEM_BYTES


def _launcher(plan: Plan) -> _Launcher:
    found = _launchers.get(id(plan))
    if found is None:
        if len(_launchers) >= _MAX_LAUNCHERS:
            _launchers.clear()
        found = _launchers[id(plan)] = _Launcher(plan)
    return found


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
    global _wide
    found = _launcher(plan)
    args = _arguments(found, act, (codes, meta, scales), (bias, out, workspace, tickets), lda)
    if not found.mapped:
        found.kernel.launch(found.blocks, found.threads, stream, args)
        return
    smem = found.smem
    if found.takes_turns:
        _wide = not _wide
        smem = WIDE_SMEM_BYTES if _wide else smem
    found.kernel.launch(found.blocks, found.threads, stream, args, pdl=PDL, cluster=found.cluster, smem_bytes=smem)


def freeze(
    plan: Plan, *, act: int, weight: tuple[int, int, int], bias: int, out: int, lda: int, stream: int
) -> Callable[[], bool]:
    """The same `launch`, of a plan that needs no memory, again and again: what is returned launches, and returns
    whether it did; if not, `launch` does, or says why not. weight: codes, meta, scales. Raises: as `launch`."""
    found = _launcher(plan)
    args = _arguments(found, act, weight, (bias, out, 0, 0), lda)
    work = functools.partial(found.kernel.freeze, found.blocks, found.threads, stream, args)
    if not found.mapped:
        return work()
    narrow = work(pdl=PDL, cluster=found.cluster, smem_bytes=found.smem)
    if not found.takes_turns:
        return narrow
    wide = work(pdl=PDL, cluster=found.cluster, smem_bytes=WIDE_SMEM_BYTES)

    def in_turn() -> bool:
        global _wide
        _wide = not _wide
        return wide() if _wide else narrow()

    return in_turn


@functools.cache
def _expand_kernel(variant: ExpandVariant, arch: str, device_index: int) -> loaded.Kernel:
    cubin = cache.get_cubin(variant.render(), name=variant.entry, arch=arch)
    smem_bytes, signature = variant.smem_bytes, variant.signature
    return loaded.load_kernel(
        cubin, variant.entry, device_index=device_index, smem_bytes=smem_bytes, signature=signature
    )


def expand(plan: Plan, slab: Slab, *, codes: int, meta: int, scales: int, out: int, stream: int) -> None:
    """Write a slab of the plan's weight, [rows, K] in 16 bits, to `out` on `stream`. Pointers as `launch` takes them.

    Raises: as `launch`.
    """
    assert plan.expansion is not None, "the plan expands nothing"
    problem, device, variant = plan.problem, plan.device, plan.expansion.variant
    loaded = _expand_kernel(variant, compiler.arch_for(device.arch), device.index)
    tile_row, tiles_k = slab.first // TILE, -(-problem.k // TILE)
    groups = 1 if problem.group_size == -1 else problem.k // problem.group_size
    sparse = problem.kind == "w4a16_sp24"
    codes += tile_row * tiles_k * (1024 if sparse else 2048)
    meta += tile_row * tiles_k * 512 if sparse else 0
    scales += tile_row * groups * 128
    args = (codes, meta, scales, out, slab.rows, problem.k)
    loaded.launch((grid(slab.rows, problem.k), 1, 1), variant.threads, stream, args)
