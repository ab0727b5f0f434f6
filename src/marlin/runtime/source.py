"""Kernel text: which variants exist, and how one becomes a self-contained translation unit.

Knows the kernel's template parameters and arguments; knows nothing of compilers and GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from marlin.runtime.config import GROUP_SIZES, Config, all_configs
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.problem import DTYPES, KINDS
from marlin.runtime.wgmma import wgmma_text

# What `sm80_*` kernels are built for ahead of time and in CI; newer GPUs compile them on first use.
ARCHS = ("80", "86", "89", "90", "100", "120")

# Arguments of every entry point, in order: type in C, name, and the character that the launcher packs it by.
ARGUMENTS = (
    ("const unsigned short*", "act", "P"),
    ("const unsigned int*", "codes", "P"),
    ("const unsigned int*", "meta", "P"),
    ("const unsigned short*", "scales", "P"),
    ("const unsigned short*", "bias", "P"),
    ("unsigned short*", "out", "P"),
    ("float4*", "workspace", "P"),
    ("int*", "tickets", "P"),
    ("int", "m", "i"),
    ("int", "n", "i"),
    ("int", "k", "i"),
    ("int", "act_stride", "i"),
    ("int", "num_m_tiles", "i"),
    ("int", "num_n_tiles", "i"),
    ("int", "num_chunks", "i"),
    ("int", "num_split_tiles", "i"),
    ("int", "stripe_chunks", "i"),
    ("int", "num_whole_tiles", "i"),
)
# The same of `sm90_*` kernels, which read through tensor maps.
MAPS = ("act", "act_tail", "codes", "meta", "scales")
_SHARED = [argument for argument in ARGUMENTS if argument[1] not in (*MAPS, "act_stride")]
_SPLIT = [name for _, name, _ in _SHARED].index("num_m_tiles")
ARGUMENTS_SM90 = (
    *(("const __grid_constant__ marlin::TensorMap", name, "T") for name in MAPS),
    *_SHARED[:_SPLIT],
    ("int", "tail_rows", "i"),
    *_SHARED[_SPLIT:],
)
SIGNATURES = {
    "sm80": "".join(code for _, _, code in ARGUMENTS),
    "sm90": "".join(code for _, _, code in ARGUMENTS_SM90),
}
_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.cuh)"\n', re.MULTILINE)


@cache
def inline(header: str, products: str = "") -> str:
    """The text of a header of `marlin/kernels` with its own headers pasted in, each once.

    products: text that follows ptx_sm90.cuh, the wgmma wrappers of a token tile.
    """
    folder, seen = resources.files("marlin") / "kernels", set[str]()

    def paste(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        text = _INCLUDE.sub(lambda match: paste(match.group(1)), text)
        return text + (
            f"\nnamespace marlin {{\n{products}\n}}  // namespace marlin\n" if name == "ptx_sm90.cuh" else ""
        )

    return paste(header)


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: kind, dtype, group size and tile."""

    kind: str
    dtype: str
    group_size: int
    config: Config

    @property
    def name(self) -> str:
        """The kernel family, such as "sm80_w4a16_sp24"."""
        return f"{self.config.family}_{self.kind}"

    @property
    def entry(self) -> str:
        """The extern "C" symbol; unique among variants."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        dtype = "bf16" if self.dtype == "bfloat16" else "fp16"
        return f"{self.name}_{dtype}_{group}_{self.config.tag}"

    @property
    def smem_bytes(self) -> int:
        return self.config.smem_bytes(self.kind, self.group_size)

    @property
    def threads(self) -> int:
        return self.config.threads

    @property
    def signature(self) -> str:
        """A character for each argument, as `loaded.load_kernel` takes it."""
        return SIGNATURES[self.config.family]

    def target(self, arch: str) -> str | None:
        """What to compile for on GPUs of architecture `arch`; None where the kernel does not run on them."""
        if self.config.family == "sm80":
            return arch
        return "90a" if arch in ("90", "90a") else None

    def entry_text(self) -> str:
        """The entry point alone: the template with this variant's parameters."""
        c = self.config
        sparse, bf16 = self.kind == "w4a16_sp24", self.dtype == "bfloat16"
        group = "marlin::kWholeRow" if self.group_size == -1 else str(self.group_size)
        flags = f"{int(sparse)}, {int(bf16)}, {group}"
        if isinstance(c, WarpgroupConfig):
            extents: tuple[int, ...] = (c.block_m, c.wgs_n, c.wgs_k, c.block_k, c.stages, c.cluster, c.min_blocks)
            return self._entry(ARGUMENTS_SM90, "90", f"{flags}, {', '.join(map(str, extents))}", c.min_blocks)
        extents = (c.block_m, c.block_n, c.block_k, c.stages, c.warps_m, c.warps_n, c.warps_k)
        return self._entry(ARGUMENTS, "", f"{flags}, {', '.join(map(str, extents))}", c.ctas_per_sm)

    def _entry(self, arguments: tuple[tuple[str, str, str], ...], suffix: str, tile: str, min_blocks: int) -> str:
        names = [name for _, name, _ in arguments]
        split = names.index("num_m_tiles")
        values = [f"&{name}" if suffix and name in MAPS else name for name in names[:split]]
        kernel = "w4a16_kernel_sm90" if suffix else "w4a16_kernel"
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {min_blocks})\n'
            f"{self.entry}({', '.join(f'{kind} {name}' for kind, name, _ in arguments)}) {{\n"
            f"    using T = marlin::Tile{suffix}<{tile}>;\n"
            f'    static_assert(T::kSmemBytes == {self.smem_bytes}, "host and device disagree on shared memory");\n'
            f"    extern __shared__ __align__({1024 if suffix else 128}) char smem[];\n"
            f"    const marlin::Args{suffix} args{{{', '.join(values)}, {{{', '.join(names[split:])}}}}};\n"
            f"    marlin::{kernel}<T>(args, smem);\n"
            f"}}\n"
        )

    def render(self) -> str:
        """The whole translation unit; includes nothing."""
        if self.config.family == "sm90":
            products = wgmma_text(self.config.block_m, bf16=self.dtype == "bfloat16")
            return inline("sm90_w4a16.cuh", products) + "\n" + self.entry_text()
        return inline("sm80_w4a16.cuh") + "\n" + self.entry_text()


def all_variants() -> list[Variant]:
    """Every kernel that can be chosen at run time."""
    return [
        Variant(kind, dtype, group_size, config)
        for kind in KINDS
        for dtype in DTYPES
        for group_size in GROUP_SIZES
        for config in all_configs(kind)
    ]
