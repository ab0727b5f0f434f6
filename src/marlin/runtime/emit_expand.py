"""The kernel that expands packed rows as one .cu with a launcher in C++, which does what `launch.expand` does.

Knows the CUDA runtime API by its text alone; compiles and launches nothing.
"""

from __future__ import annotations

from marlin.runtime.expansion import BLOCK_COLUMNS, TILE, ExpandVariant
from marlin.runtime.problem import KINDS

NAMES = tuple(f"sm80_expand_{kind}" for kind in KINDS)

_TEXT = """// {name}, {dtype}, group_size {group_size}. Build: nvcc -std=c++17 -arch=sm_80 (or newer).
#include <cuda_runtime.h>
#pragma nv_diag_suppress 177  // names that this kernel does not use
{kernel}
// Writes rows `first` to `first + rows - 1` of a weight [N, K] to out [rows, K], zeros included, on `stream`; a product
// of any library with these rows follows.
//   codes, meta, scales: the whole weight as marlin.formats.layouts.pack orders it, meta null where it is dense; all of
//   them and out 16-byte aligned. first is a multiple of {tile}, first + rows at most N; K is a multiple of 32 and of
//   the group; rows * K is less than 2^31.
//   Returns a cudaError_t (0: success).
extern "C" int marlin_expand(const unsigned int* codes, const unsigned int* meta, const unsigned short* scales,
                             unsigned short* out, int first, int rows, int k, cudaStream_t stream) {{
    if (first < 0 || first % {tile} || rows < 1 || k < 32 || k % 32 || k % {group} != 0) return cudaErrorInvalidValue;
    const size_t row = first / {tile}, tiles_k = (k + {tile} - 1) / {tile}, groups = {groups};
    const int grid = (rows + {tile} - 1) / {tile} * ((k + {columns} - 1) / {columns});
    {entry}<<<grid, {threads}, {smem}, stream>>>(
        codes + row * tiles_k * {code_words}, {meta}, scales + row * groups * {tile}, out, rows, k);
    return cudaGetLastError();
}}
"""


def emit_expand(name: str, *, dtype: str, group_size: int) -> str:
    """One self-contained .cu (base CUDA only) with an `extern "C"` launcher, `marlin_expand`.

    name, dtype, group_size: of a variant.
    """
    variant = ExpandVariant(name.removeprefix("sm80_expand_"), dtype, group_size)
    sparse = variant.kind == "w4a16_sp24"
    return _TEXT.format(
        name=name,
        dtype=dtype,
        group_size=group_size,
        kernel=variant.render(),
        tile=TILE,
        columns=BLOCK_COLUMNS,
        group=max(group_size, 1),
        groups=1 if group_size == -1 else f"k / {group_size}",
        entry=variant.entry,
        threads=variant.threads,
        smem=variant.smem_bytes,
        code_words=256 if sparse else 512,
        meta="meta + row * tiles_k * 128" if sparse else "meta",
    )
