"""Kernels between products: which variants exist, how rows are cut into blocks, and launches. Pointers and ints only.

Owns what follows from the extents of a row and their number. Must not know whose rows they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from marlin.errors import LaunchError, message
from marlin.runtime import cache, compiler, driver, loaded
from marlin.runtime.launch import PDL
from marlin.runtime.problem import DTYPES
from marlin.runtime.source import inline

OPS = ("rms_norm", "fused_add_rms_norm", "silu_and_mul")
# Arguments of entry points, in order: type in C, name, and the character that the launcher packs it by.
_NORM = (
    ("const unsigned short*", "x", "P"),
    ("const unsigned short*", "residual", "P"),
    ("const unsigned short*", "weight", "P"),
    ("unsigned short*", "out", "P"),
    ("unsigned short*", "sum", "P"),
    ("unsigned int", "hidden", "i"),
    ("unsigned int", "x_stride", "i"),
    ("unsigned int", "residual_stride", "i"),
    ("float", "eps", "f"),
)
_SILU = (
    ("const unsigned short*", "x", "P"),
    ("unsigned short*", "out", "P"),
    ("unsigned int", "width", "i"),
    ("unsigned int", "x_stride", "i"),
    ("unsigned int", "blocks_of_a_row", "i"),
)
ROW_MULTIPLE = 8  # values of a piece, which divide rows and strides
# Of a norm: pieces of a thread, and the threads of a block at most.
_NORM_TILES = ((1, 512), (2, 512), (4, 1024))
# Of silu: pieces and threads, for few rows and for many.
_SILU_TILES = ((1, 128), (2, 256))
MAX_HIDDEN = ROW_MULTIPLE * _NORM_TILES[-1][0] * _NORM_TILES[-1][1]
_THREADS_OF_MULTIPROCESSOR = 2048
_MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class RowwiseVariant:
    """One compiled kernel: what it computes (of OPS), dtype, pieces of a thread, and whether it takes early starts."""

    kind: str
    dtype: str
    pieces: int
    threads: int  # of a block, at most
    early: bool

    group_size = None

    @property
    def name(self) -> str:
        """The kernel family, such as "sm90_rms_norm"."""
        return f"{'sm90' if self.early else 'sm80'}_{self.kind}"

    @property
    def entry(self) -> str:
        """The extern "C" symbol; unique among variants."""
        return f"{self.name}_{'bf16' if self.dtype == 'bfloat16' else 'fp16'}_p{self.pieces}"

    @property
    def smem_bytes(self) -> int:
        return 0 if self.kind == "silu_and_mul" else 128

    @property
    def signature(self) -> str:
        """A character for each argument, as `loaded.load_kernel` takes it."""
        return "".join(code for _, _, code in self._arguments)

    @property
    def _arguments(self) -> tuple[tuple[str, str, str], ...]:
        return _SILU if self.kind == "silu_and_mul" else _NORM

    def target(self, arch: str) -> str | None:
        """What to compile for on GPUs of architecture `arch`; None where the kernel does not run on them."""
        return arch if not self.early or arch in ("90", "90a") else None

    def entry_text(self) -> str:
        """The entry point alone: the template with this variant's parameters."""
        bf16, early = int(self.dtype == "bfloat16"), int(self.early)
        names = ", ".join(name for _, name, _ in self._arguments)
        if self.kind == "silu_and_mul":
            tile, call = f"Silu<{bf16}, {self.pieces}, {self.threads}, {early}>", f"silu_kernel<T>({{{names}}})"
            memory = ""
        else:
            tile = f"Norm<{int(self.kind == 'fused_add_rms_norm')}, {bf16}, {self.pieces}, {early}>"
            call, memory = f"norm_kernel<T>({{{names}}}, sums)", "    extern __shared__ __align__(16) float sums[];\n"
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads})\n'
            f"{self.entry}({', '.join(f'{kind} {name}' for kind, name, _ in self._arguments)}) {{\n"
            f"    using T = marlin::{tile};\n"
            f'    static_assert(T::kSmemBytes == {self.smem_bytes}, "host and device disagree on shared memory");\n'
            f"{memory}"
            f"    marlin::{call};\n"
            f"}}\n"
        )

    def render(self) -> str:
        """The whole translation unit; includes nothing."""
        return inline("rowwise.cuh") + "\n" + self.entry_text()


def all_rowwise_variants() -> list[RowwiseVariant]:
    """Every kernel of this room, plain ones first."""
    return [
        RowwiseVariant(op, dtype, *tile, early)
        for early in (False, True)
        for op in OPS
        for dtype in DTYPES
        for tile in (_SILU_TILES if op == "silu_and_mul" else _NORM_TILES)
    ]


class RowwisePlan(NamedTuple):
    """A launch but for its kernel, pointers and strides. width: of an output row; blocks_of_a_row: 1 for norms."""

    variant: RowwiseVariant
    grid: int
    threads: int
    width: int
    blocks_of_a_row: int

    def norm(
        self, kernel: loaded.Kernel, pointers: tuple[int, ...], strides: tuple[int, int], eps: float, stream: int
    ) -> None:
        """Launch a norm. kernel: the plan's. pointers: x, residual (0: none), weight, out, sums (0: none).

        strides: of rows of x and residual, in values. Raises: LaunchError.
        """
        args = (*pointers, self.width, *strides, eps)
        kernel.launch((self.grid, 1, 1), self.threads, stream, args, pdl=self.variant.early)

    def silu_and_mul(self, kernel: loaded.Kernel, x: int, out: int, stride: int, stream: int) -> None:
        """Launch silu(gate) * up of rows of x, gate first, into `out`. kernel: the plan's. Raises: LaunchError."""
        args = (x, out, self.width, stride, self.blocks_of_a_row)
        kernel.launch((self.grid, 1, 1), self.threads, stream, args, pdl=self.variant.early)


def make_rowwise_plan(
    op: str, rows: int, width: int, dtype: str, device: driver.DeviceInfo, *, early: bool = PDL
) -> RowwisePlan:
    """The launch for `rows` rows of `width` values of the output: a multiple of 8, and of a norm at most MAX_HIDDEN.

    early: start early and let the next kernel do so, where the GPU's products do too.
    """
    early = early and device.arch == (9, 0)
    pieces = width // ROW_MULTIPLE
    if op == "silu_and_mul":
        tile = _SILU_TILES[rows * pieces > device.num_sms * _THREADS_OF_MULTIPROCESSOR]
        blocks = -(-pieces // (tile[0] * tile[1]))
        return RowwisePlan(RowwiseVariant(op, dtype, *tile, early), rows * blocks, tile[1], width, blocks)
    # Why by the width alone: the order in which a row is added up must not depend on the number of rows.
    tile = next(tile for tile in _NORM_TILES if pieces <= tile[0] * tile[1])
    threads = -(-pieces // (32 * tile[0])) * 32
    return RowwisePlan(RowwiseVariant(op, dtype, *tile, early), rows, threads, width, 1)


@functools.lru_cache(maxsize=8192)
def rowwise_plan(op: str, rows: int, width: int, dtype: str, device_index: int) -> RowwisePlan:
    """`make_rowwise_plan` for a GPU of this machine, cached. Raises: UnsupportedError, LaunchError (too many rows)."""
    found = make_rowwise_plan(op, rows, width, dtype, driver.device_info(device_index))
    if found.grid > _MAX_INT:
        fix = "Pass fewer rows at a time."
        raise LaunchError(message(op, f"a launch must have at most {_MAX_INT} blocks", str(found.grid), fix))
    return found


@functools.cache
def _kernel(variant: RowwiseVariant, arch: str, device_index: int) -> loaded.Kernel:
    cubin = cache.get_cubin(variant.render(), name=variant.entry, arch=arch)
    smem_bytes, signature = variant.smem_bytes, variant.signature
    # Why the carve-out: where it differs from that of the kernel before, blocks wait for an empty multiprocessor.
    return loaded.load_kernel(
        cubin,
        variant.entry,
        device_index=device_index,
        smem_bytes=smem_bytes,
        signature=signature,
        most_smem=variant.early,
    )


def rowwise_kernel(variant: RowwiseVariant, device_index: int) -> loaded.Kernel:
    """The loaded kernel of a variant on a GPU; compiled on first use.

    Raises: CompileError, LaunchError, UnsupportedError.
    """
    return _kernel(variant, compiler.arch_for(driver.device_info(device_index).arch), device_index)
