"""A kernel family as one .cu with a launcher in C++: the kernels of a few tiles, and what `plan` and `launch` do here.

Knows the CUDA runtime API by its text alone; compiles and launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from marlin.errors import require
from marlin.runtime.config import (
    GROUP_SIZES,
    MAX_M,
    MAX_WORKSPACE_BYTES,
    TileConfig,
    all_configs,
    why_illegal,
)
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.cost import cost_us
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.emit_expand import NAMES as EXPAND_NAMES
from marlin.runtime.emit_expand import emit_expand
from marlin.runtime.problem import DTYPES, KINDS, Problem
from marlin.runtime.source import ARGUMENTS, Variant, inline
from marlin.runtime.wgmma import wgmma_text

NAMES = tuple(f"{family}_{kind}" for family in ("sm80", "sm90") for kind in KINDS)  # of products

# Arguments of the launcher: those of sm80_* kernels before the integers of a schedule.
_ARGUMENTS = ARGUMENTS[: [name for _, name, _ in ARGUMENTS].index("num_m_tiles")]

# What the tiles of a Hopper file are chosen by, with the cost model: the most tokens of a range, the layers of a
# Llama-3.1-8B block, and the GPU (NVIDIA H100 SXM, by data sheet).
_TOKENS = (8, 16, 32, 64, 128, 256, 4096)
_LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
_HOPPER = DeviceInfo(0, "H100 SXM", (9, 0), 132, 232448, 50 << 20, 1_980_000, 3.35e12)

_QUIET = "#pragma nv_diag_suppress 177  // names that these kernels do not use\n"
_CONTRACT = """
// Computes out[M, N] = act[M, K] @ weight[N, K].T (+ bias) on `stream`.
//   act [M, K], row stride act_stride, a multiple of 8; codes, meta, scales: the weight as marlin.formats.layouts.pack
//   orders it, meta null where the kernel is dense; bias [N] or null; out [M, N] contiguous. Operands and out are
//   16-byte aligned; N is a multiple of 8, K of {k_multiple} and of the group.
//   workspace: marlin_workspace_bytes() of device memory; tickets: {blocks} ints per multiprocessor, all zero before
//   the first call and left zero by every call. Both belong to one stream.
//   Returns a cudaError_t (0: success).
extern "C" size_t marlin_workspace_bytes() {{ return {workspace}; }}
"""
_LAUNCH = """
extern "C" int marlin_launch({parameters}, cudaStream_t stream) {{
    int device = 0, sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    if (m < 1 || m > {max_m} || n < 8 || n % 8 || act_stride < k || act_stride % 8) return cudaErrorInvalidValue;
{k_note}    if (k < {k_multiple} || k % {k_multiple} || k % {group} != 0) return cudaErrorInvalidValue;
{cases}}}
"""
_CASE_SM80 = """    %(condition)s{
        constexpr int block_m = %(m)d, block_n = %(n)d, block_k = %(k)d, smem = %(smem)d;
        int fit = 0;  // blocks on a multiprocessor
        error = cudaFuncSetAttribute(%(entry)s, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
        if (error == cudaSuccess)
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, %(entry)s, %(threads)d, smem);
        if (error != cudaSuccess) return error;
        const int m_tiles = (m + block_m - 1) / block_m, n_tiles = (n + block_n - 1) / block_n;
        const int chunks = (k + block_k - 1) / block_k, tiles = m_tiles * n_tiles;
        const long long units = static_cast<long long>(tiles) * chunks;
        const long long blocks = sms * std::min(std::max(fit, 1), %(ctas)d);
        const int grid = static_cast<int>(std::min(units, blocks));
        const int whole = tiles / grid, split = tiles %% grid;
        const int stripe = split ? (split * chunks + grid - 1) / grid : 1;
        %(entry)s<<<grid, %(threads)d, smem, stream>>>(
            %(arguments)s, m_tiles, n_tiles, chunks, split, stripe, whole);
        return cudaGetLastError();
    }
"""

_HELPERS_SM90 = """
// Whether a kernel may start while the one before it on the stream ends; -DMARLIN_PDL=0: it may not. It reads codes,
// metadata and scales before that one has ended: weights must not be written by a kernel that lets its successor start
// early.
#ifndef MARLIN_PDL
#define MARLIN_PDL 1
#endif

namespace {

constexpr bool kSparse = %(sparse)s;
constexpr int kGroupSize = %(group_size)d;  // -1: a row

// A kernel, its extents, and the most tokens that it is for. cluster: blocks that share a tile, each with its part of
// K; 0: the blocks of the grid share all tiles evenly.
struct Tile {
    int max_m, block_m, wgs_n, block_k, chunk_groups, cluster, blocks_per_sm, threads, smem_bytes;
    decltype(&%(entry)s) kernel;
};
const Tile kTiles[] = {
%(tiles)s};

// The driver's cuTensorMapEncodeTiled, found at run time: nothing links libcuda.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// A tensor of three dimensions for the copy engine, innermost first; strides in bytes, of the second and the third.
cudaError_t describe(marlin::TensorMap& map, CUtensorMapDataType type, const void* data, const cuuint64_t (&extents)[3],
                     const cuuint64_t (&strides)[2], const cuuint32_t (&box)[3]) {
    static const auto encode = find_encoder();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint32_t steps[3] = {1, 1, 1};
    const bool words = type == CU_TENSOR_MAP_DATA_TYPE_UINT64;
    const auto swizzle = words ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
    CUtensorMap made;
    const CUresult result =
        encode(&made, type, 3, const_cast<void*>(data), extents, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    static_assert(sizeof(map) == sizeof(made), "the kernel takes what the driver makes");
    std::memcpy(&map, &made, sizeof(map));
    return static_cast<cudaError_t>(result);
}

// A packed part of the weight in words of 8 bytes: `inner` of a tile (64 rows of `columns` groups of columns).
cudaError_t describe_weight(marlin::TensorMap& map, const Tile& tile, const void* data, int inner, int n, int columns,
                            int box_columns) {
    const cuuint64_t extents[3] = {cuuint64_t(inner), cuuint64_t(columns), cuuint64_t((n + 63) / 64)};
    const cuuint64_t strides[2] = {8 * extents[0], 8 * extents[0] * extents[1]};
    const cuuint32_t box[3] = {cuuint32_t(inner), cuuint32_t(box_columns), cuuint32_t(tile.wgs_n)};
    return describe(map, CU_TENSOR_MAP_DATA_TYPE_UINT64, data, extents, strides, box);
}

// How tiles and chunks of K fall on blocks.
struct Geometry {
    int grid, m_tiles, n_tiles, chunks, split, stripe, whole;

    Geometry(const Tile& tile, int m, int n, int k, int sms) {
        const int block_n = 64 * tile.wgs_n;
        m_tiles = (m + tile.block_m - 1) / tile.block_m;
        n_tiles = (n + block_n - 1) / block_n;
        chunks = (k + tile.block_k - 1) / tile.block_k;
        const int tiles = m_tiles * n_tiles;
        if (tile.cluster > 0) {  // every block of a cluster takes as many chunks; those beyond the end of K are zeros
            stripe = (chunks + tile.cluster - 1) / tile.cluster;
            chunks = stripe * tile.cluster;
            grid = tiles * tile.cluster;
            split = tiles;
            whole = 0;
            return;
        }
        const long long units = static_cast<long long>(tiles) * chunks, blocks = tile.blocks_per_sm * sms;
        grid = static_cast<int>(std::min(units, blocks));
        split = tiles %% grid;
        whole = tiles / grid;
        stripe = split ? (split * chunks + grid - 1) / grid : 1;
    }
};

}  // namespace
"""
_CASE_SM90 = """    const Tile* tile = kTiles;
    while (m > tile->max_m) ++tile;
    const Geometry shape(*tile, m, n, k, sms);
    marlin::TensorMap act_map, act_tail_map, code_map, meta_map, scale_map;
    const int panels = k / 64, box = tile->block_k / 64;
    const int tail_rows = (m - (shape.m_tiles - 1) * tile->block_m + 7) / 8 * 8;  // tokens of the last tile
    const cuuint64_t act_extents[3] = {{64, cuuint64_t(m), cuuint64_t(panels)}};
    const cuuint64_t act_strides[2] = {{2 * cuuint64_t(act_stride), 128}};
    error = describe(act_map, {act_type}, act, act_extents, act_strides,
                     {{64, cuuint32_t(tile->block_m), cuuint32_t(box)}});
    if (error == cudaSuccess)
        error = describe(act_tail_map, {act_type}, act, act_extents, act_strides,
                         {{64, cuuint32_t(tail_rows), cuuint32_t(box)}});
    if (error == cudaSuccess) error = describe_weight(code_map, *tile, codes, kSparse ? 128 : 256, n, panels, box);
    meta_map = code_map;
    if (error == cudaSuccess && kSparse) error = describe_weight(meta_map, *tile, meta, 64, n, panels, box);
    const int groups = kGroupSize == -1 ? 1 : k / kGroupSize;
    if (error == cudaSuccess) error = describe_weight(scale_map, *tile, scales, 16, n, groups, tile->chunk_groups);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(tile->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile->smem_bytes);
    if (error != cudaSuccess) return error;

    cudaLaunchAttribute attributes[3] = {{}};
    unsigned count = 0;
    if (MARLIN_PDL) {{
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }}
    if (tile->cluster > 1) {{  // neighbours along x, spread over multiprocessors
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {{static_cast<unsigned>(tile->cluster), 1, 1}};
        attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
        attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
    }}
    cudaLaunchConfig_t config = {{}};
    config.gridDim = dim3(shape.grid);
    config.blockDim = dim3(tile->threads);
    config.dynamicSmemBytes = tile->smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, tile->kernel, act_map, act_tail_map, code_map, meta_map, scale_map, bias, out,
                              workspace, tickets, m, n, k, tail_rows, shape.m_tiles, shape.n_tiles,
                              shape.chunks, shape.split, shape.stripe, shape.whole);
"""


def emit(name: str, *, dtype: str = "float16", group_size: int = 128) -> str:
    """One self-contained .cu (base CUDA only) of a kernel family, with an `extern "C"` launcher.

    name: one of NAMES, whose launcher is the same for all and chooses a tile by M alone; or of EXPAND_NAMES, see
    `emit_expand`. Raises: ValueError (unknown name, dtype or group size).
    """
    known = (*NAMES, *EXPAND_NAMES)
    require(name in known, "kernels emit", f"NAME must be one of {known}", repr(name))
    require(dtype in DTYPES, "kernels emit", f"dtype must be one of {DTYPES}", repr(dtype))
    require(group_size in GROUP_SIZES, "kernels emit", f"group_size must be one of {GROUP_SIZES}", str(group_size))
    if name in EXPAND_NAMES:
        return emit_expand(name, dtype=dtype, group_size=group_size)
    family, kind = name.split("_", 1)
    return (_emit_sm90 if family == "sm90" else _emit_sm80)(name, kind, dtype, group_size)


def _emit_sm80(name: str, kind: str, dtype: str, group_size: int) -> str:
    """The smallest token tile that holds M, of each the first configuration."""
    by_block_m = {c.block_m: c for c in reversed(all_configs(kind)) if isinstance(c, TileConfig)}
    variants = [Variant(kind, dtype, group_size, by_block_m[m]) for m in sorted(by_block_m)]
    cases = "".join(
        _CASE_SM80
        % {
            "condition": "" if variant is variants[-1] else f"if (m <= {variant.config.block_m}) ",
            "m": variant.config.block_m,
            "n": variant.config.block_n,
            "k": variant.config.block_k,
            "ctas": variant.config.ctas_per_sm,
            "entry": variant.entry,
            "smem": variant.smem_bytes,
            "threads": variant.threads,
            "arguments": ", ".join(arg for _, arg, _ in _ARGUMENTS),
        }
        for variant in variants
    )
    head = _head(name, dtype, group_size, "-arch=sm_80 (or newer).", ("cuda_runtime.h", "algorithm"))
    return head + _kernels("sm80", variants) + _contract(32, variants) + _launch(32, group_size, cases)


def _emit_sm90(name: str, kind: str, dtype: str, group_size: int) -> str:
    tiles = hopper_tiles(kind, dtype, group_size)
    variants, rows = [], []
    for max_m, c in tiles:
        variants.append(Variant(kind, dtype, group_size, c))
        extents = (
            max_m,
            c.block_m,
            c.wgs_n,
            c.block_k,
            c.chunk_groups(group_size),
            c.cluster,
            c.ctas_per_sm,
            c.threads,
        )
        rows.append(f"    {{{', '.join(map(str, (*extents, variants[-1].smem_bytes, variants[-1].entry)))}}},\n")
    helpers = _HELPERS_SM90 % {
        "sparse": "true" if kind == "w4a16_sp24" else "false",
        "group_size": group_size,
        "entry": variants[0].entry,
        "tiles": "".join(rows),
    }
    act_type = "CU_TENSOR_MAP_DATA_TYPE_" + {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]
    flags, includes = (
        "-gencode=arch=compute_90a,code=sm_90a (Hopper alone).",
        ("cuda.h", "cuda_runtime.h", "algorithm", "cstring"),
    )
    head = _head(name, dtype, group_size, flags, includes)
    text = head + _kernels("sm90", variants) + helpers + _contract(64, variants)
    return text + _launch(64, group_size, _CASE_SM90.format(act_type=act_type))


def hopper_tiles(kind: str, dtype: str, group_size: int) -> list[tuple[int, WarpgroupConfig]]:
    """The configurations of an emitted `sm90_*` file, each with the most tokens that it is for, ascending.

    Of each range of tokens the one that the cost model finds cheapest, on average over a few layers relative to the
    cheapest of each.
    """
    tiles: list[tuple[int, WarpgroupConfig]] = []
    for tokens in _TOKENS:
        problems = [Problem(tokens, n, k, group_size, dtype, kind) for n, k in _LAYERS]
        best = _cheapest((c for c in all_configs(kind) if isinstance(c, WarpgroupConfig)), problems)
        if tiles and tiles[-1][1] == best:
            tiles.pop()
        tiles.append((tokens, best))
    return [*tiles[:-1], (MAX_M, tiles[-1][1])]


def _cheapest(configs: Iterable[WarpgroupConfig], problems: list[Problem]) -> WarpgroupConfig:
    legal = [c for c in configs if not any(why_illegal(c, problem, _HOPPER) for problem in problems)]
    relative = [0.0] * len(legal)
    for problem in problems:
        costs = [cost_us(config, problem, _HOPPER) for config in legal]
        relative = [total + us / min(costs) for total, us in zip(relative, costs, strict=True)]
    return legal[relative.index(min(relative))]


def _head(name: str, dtype: str, group_size: int, flags: str, includes: tuple[str, ...]) -> str:
    build = f"// {name}, {dtype}, group_size {group_size}. Build: nvcc -std=c++17 {flags}\n"
    return build + "".join(f"#include <{header}>\n" for header in includes) + _QUIET


def _kernels(family: str, variants: list[Variant]) -> str:
    """Headers and entry points; of sm90 with the products of every token tile, each once."""
    extents = sorted({variant.config.block_m for variant in variants}) if family == "sm90" else []
    products = "".join(wgmma_text(n, bf16=variants[0].dtype == "bfloat16") for n in extents)
    return inline(f"{family}_w4a16.cuh", products) + "\n" + "\n".join(v.entry_text() for v in variants)


def _contract(k_multiple: int, variants: list[Variant]) -> str:
    blocks = max(variant.config.ctas_per_sm for variant in variants)
    return _CONTRACT.format(k_multiple=k_multiple, blocks=blocks, workspace=f"{MAX_WORKSPACE_BYTES >> 20}u << 20")


def _launch(k_multiple: int, group_size: int, cases: str) -> str:
    k_note = (
        "    // Tiles of the weight are 64 columns, whole to the copy engine; sm80_w4a16_* takes multiples of 32.\n"
    )
    return _LAUNCH.format(
        parameters=", ".join(f"{kind} {arg}" for kind, arg, _ in _ARGUMENTS),
        max_m=MAX_M,
        k_multiple=k_multiple,
        group=max(group_size, 1),
        k_note=k_note if k_multiple == 64 else "",
        cases=cases,
    )
