"""Expanded products: a kernel writes rows of the weight in 16 bits, slab by slab, and cuBLAS multiplies them.

Owns the kernel that expands, how a weight is cut into slabs, and when the way is worth its while. Knows pointers and
ints; cuBLAS is called by `marlin.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from marlin.runtime.config import GROUP_SIZES
from marlin.runtime.cost import dense_ops_per_cycle
from marlin.runtime.problem import DTYPES, KINDS, Problem
from marlin.runtime.source import inline

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo

# Arguments of every entry point: type in C, name, and the character that the launcher packs it by.
ARGUMENTS = (
    ("const unsigned int*", "codes", "P"),
    ("const unsigned int*", "meta", "P"),
    ("const unsigned short*", "scales", "P"),
    ("unsigned short*", "out", "P"),
    ("unsigned int", "rows", "i"),
    ("unsigned int", "k", "i"),
)
# Why so: it bounds the memory of a call, whatever the layer, as MAX_WORKSPACE_BYTES does for parts of tiles. Smaller
# slabs stay in the second-level cache and are written faster, but cuBLAS is slower on few rows, and every slab costs
# two launches.
MAX_SLAB_BYTES = 60_000_000
TILE = 64  # rows and columns of a packed tile
BLOCK_COLUMNS = 128  # of a kernel's block, which has 64 rows
_THREADS, _SMEM_BYTES = 128, 8192
_CUBLAS_ROWS = 256  # rows of a slab that cuBLAS's tiles divide, where there are so many
_MORE_SLABS = 8  # than the least number, that are tried

MIN_M = 128  # with fewer, reading the weight bounds the portable kernels, and writing it takes longer
_CLEARLY = 0.93  # of the other estimate: both models err by some percent
_LEAST_US = 20.0  # of the other estimate: the host spends longer on the calls than on a launch
# Of a multiprocessor, and of the nominal bandwidth, read and written, where a slab takes more than that share of L2; as
# measured with slabs of 8 to 235 MB on the layers of a Llama-3.1-8B block (NVIDIA H200, CUDA 13.0).
_EXPAND_LAUNCH_US, _L2_BYTES_PER_CYCLE, _MEMORY_SHARE, _L2_SHARE = 1.55, 17.6, 0.78, 0.67
# cuBLAS's share of the dense tensor rate at the nominal clock and of the memory's nominal bandwidth, its tiles, and how
# much of a last wave that is not full it loses. Fitted to its times at M >= 128 in the GEMM record (NVIDIA H200, CUDA
# 13.0); a test holds the two together. GPUs that power does not hold down as far should be above the share.
_CUBLAS_LAUNCH_US, _CUBLAS_SHARE, _CUBLAS_MEMORY_SHARE = 3.0, 0.66, 0.85
_CUBLAS_TILES, _FILL_POWER = ((128, 256), (256, 128), (128, 128), (64, 256), (192, 128)), 0.2


@dataclass(frozen=True)
class ExpandVariant:
    """One compiled kernel that expands: kind, dtype and group size."""

    kind: str
    dtype: str
    group_size: int

    smem_bytes = _SMEM_BYTES
    threads = _THREADS
    signature = "".join(code for _, _, code in ARGUMENTS)

    @property
    def name(self) -> str:
        """The kernel family, such as "sm80_expand_w4a16_sp24"."""
        return f"sm80_expand_{self.kind}"

    @property
    def entry(self) -> str:
        """The extern "C" symbol; unique among variants."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.name}_{'bf16' if self.dtype == 'bfloat16' else 'fp16'}_{group}"

    def target(self, arch: str) -> str | None:
        """What to compile for on GPUs of architecture `arch`."""
        return arch

    def entry_text(self) -> str:
        """The entry point alone: the template with this variant's parameters."""
        group = "marlin::kWholeRow" if self.group_size == -1 else str(self.group_size)
        flags = f"{int(self.kind == 'w4a16_sp24')}, {int(self.dtype == 'bfloat16')}, {group}"
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads})\n'
            f"{self.entry}({', '.join(f'{kind} {name}' for kind, name, _ in ARGUMENTS)}) {{\n"
            f"    using T = marlin::Expand<{flags}>;\n"
            f"    static_assert(T::kThreads == {self.threads} && T::kSmemBytes == {self.smem_bytes} && "
            f'T::kTilesK * 64 == {BLOCK_COLUMNS}, "host and device disagree on a block");\n'
            f"    extern __shared__ __align__(128) char smem[];\n"
            f"    marlin::expand_kernel<T>({{{', '.join(name for _, name, _ in ARGUMENTS)}}}, smem);\n"
            f"}}\n"
        )

    def render(self) -> str:
        """The whole translation unit; includes nothing."""
        return inline("expand.cuh") + "\n" + self.entry_text()


def all_expand_variants() -> list[ExpandVariant]:
    """Every kernel that expands."""
    return [ExpandVariant(kind, dtype, size) for kind in KINDS for dtype in DTYPES for size in GROUP_SIZES]


class Slab(NamedTuple):
    """Rows of the weight that are expanded at a time; first is a multiple of 64."""

    first: int
    rows: int


class Expansion(NamedTuple):
    """An expanded product: what expands, in which slabs of rows of k, and the estimate in microseconds."""

    variant: ExpandVariant
    slabs: tuple[Slab, ...]
    k: int
    us: float

    @property
    def slab_rows(self) -> int:
        """Of the largest slab."""
        return max(slab.rows for slab in self.slabs)

    @property
    def slab_bytes(self) -> int:
        """Of the memory for the largest slab."""
        return self.slab_rows * self.k * 2

    @property
    def name(self) -> str:
        """What computes, such as "sm80_expand_w4a16_sp24 + cuBLAS"."""
        return f"{self.variant.name} + cuBLAS"

    @property
    def tag(self) -> str:
        """Short name: the slabs."""
        return f"{len(self.slabs)}x{self.slab_rows}"


def grid(rows: int, k: int) -> int:
    """Blocks that expand so many rows: one for each 64 rows by BLOCK_COLUMNS."""
    return -(-rows // TILE) * -(-k // BLOCK_COLUMNS)


def cut(n: int, k: int, max_bytes: int = MAX_SLAB_BYTES, more: int = 0) -> tuple[Slab, ...]:
    """Slabs of about one size, none larger than max_bytes unless 64 rows are: the least number, and `more`."""
    most = max(TILE, max_bytes // (2 * k) // TILE * TILE)
    rows = -(-n // (-(-n // most) + more))
    unit = _CUBLAS_ROWS if -(-rows // _CUBLAS_ROWS) * _CUBLAS_ROWS <= most else TILE
    rows = -(-rows // unit) * unit
    return tuple(Slab(first, min(rows, n - first)) for first in range(0, n, rows))


def why_not(problem: Problem, family: str) -> str | None:
    """Why the problem is not expanded where `family` has its best configuration, whatever it costs; or None."""
    if family != "sm80":
        return f"{family} kernels are faster than expanding."
    if problem.batch_invariant:
        return "cuBLAS adds along K in an order that depends on M."
    if problem.m < MIN_M:
        return f"expanding is for M of at least {MIN_M}."
    return None


def expand_us(problem: Problem, slab: Slab, device: DeviceInfo) -> float:
    """Estimated time of expanding a slab, in microseconds: a launch, and the bytes that are read and written."""
    written = 2 * slab.rows * problem.k
    cycles_per_us = device.sm_clock_khz / 1e3
    rate = device.num_sms * cycles_per_us * _L2_BYTES_PER_CYCLE
    if written > _L2_SHARE * device.l2_bytes:
        rate = min(rate, device.memory_bytes_per_s / 1e6 * _MEMORY_SHARE)
    return float(_EXPAND_LAUNCH_US + (written + problem.weight_bytes * slab.rows / problem.n) / rate)


def cublas_us(m: int, n: int, k: int, device: DeviceInfo) -> float:
    """Estimated time of a product of cuBLAS in 16 bits, in microseconds."""
    # Why the best of several tiles, and a small power: cuBLAS chooses its tile, and fills the last wave by cutting K.
    sms, fill = device.num_sms, 0.0
    for block_m, block_n in _CUBLAS_TILES:
        waves = -(-(-(-m // block_m) * -(-n // block_n)) // sms)
        fill = max(fill, m * n / (waves * sms * block_m * block_n))
    rate = dense_ops_per_cycle(device.arch) * sms * (device.sm_clock_khz / 1e3) * _CUBLAS_SHARE * fill**_FILL_POWER
    moved = 2 * (m * (n + k) + n * k) / (device.memory_bytes_per_s * _CUBLAS_MEMORY_SHARE) * 1e6
    return float(_CUBLAS_LAUNCH_US + ((2 * m * n * k / rate) ** 3 + moved**3) ** (1 / 3))


def expansion(problem: Problem, device: DeviceInfo) -> Expansion:
    """The expanded product of a problem in the slabs that cost least, with its estimate."""
    found = []
    for slabs in dict.fromkeys(cut(problem.n, problem.k, more=more) for more in range(_MORE_SLABS + 1)):
        us = sum(
            expand_us(problem, slab, device) + cublas_us(problem.m, slab.rows, problem.k, device) for slab in slabs
        )
        found.append(Expansion(_variant(problem), slabs, problem.k, us))
    return min(found, key=lambda one: one.us)


def _variant(problem: Problem) -> ExpandVariant:
    return ExpandVariant(problem.kind, problem.dtype, problem.group_size)


def worthwhile(problem: Problem, device: DeviceInfo, family: str, us: float) -> Expansion | None:
    """The expanded product where it is clearly faster than the best configuration: one of `family` that takes `us`."""
    if why_not(problem, family) is not None:
        return None
    found = expansion(problem, device)
    return found if found.us < _CLEARLY * us and us > _LEAST_US else None
