"""Builds kernel variants for the host with g++, and stands in for the driver where Hopper kernels are launched."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from marlin.runtime.driver import DeviceInfo
from marlin.runtime.expansion import ExpandVariant
from marlin.runtime.rowwise import RowwiseVariant
from marlin.runtime.source import MAPS, Variant

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "src" / "marlin" / "kernels"
# A GPU with few multiprocessors: small problems then have whole and split tiles, and blocks that meet two of them.
GPU = DeviceInfo(0, "host", (9, 0), 3, 232448, 50 << 20, 1_000_000, 1e12)
# Kernel text to find, and what to put there.
Fault = tuple[str, str]
_NONE = ("\n", "\n")
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "uint64": 8}


@cache
def built(variant: Variant | ExpandVariant | RowwiseVariant, folder: Path, fault: Fault = _NONE) -> ctypes.CDLL:
    """The variant as a shared library."""
    folder = folder / str(abs(hash(fault)))
    source = folder / "source"
    if not source.exists():
        shutil.copytree(KERNELS, source)
        found = 0
        for header in source.glob("*.cuh"):
            found += fault[0] in (text := header.read_text())
            header.write_text(text.replace(*fault))
        assert found, f"no kernel text has {fault[0]!r}"
        for file in (*HERE.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cpp")):
            shutil.copy(file, source / file.name)
    tile = re.search("using T = (.*);", variant.entry_text())
    assert tile is not None
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        f"-DTILE={tile[1]}",
        f"-DBF16={variant.dtype == 'bfloat16':d}",
    ]
    library = folder / f"{variant.entry}.so"
    harness = {ExpandVariant: "harness_expand.cpp", RowwiseVariant: "harness_rowwise.cpp"}.get(type(variant))
    if isinstance(variant, Variant):
        harness = {"sm80": "harness.cpp", "sm90": "harness_sm90.cpp"}[variant.config.family]
    assert harness is not None
    result = subprocess.run(["g++", *flags, "-o", str(library), str(source / harness)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    loaded = ctypes.CDLL(str(library))
    assert loaded.smem_bytes() == variant.smem_bytes
    return loaded


def check_run(result: int) -> None:
    """Raises AssertionError for what `run` of a library returns when something is wrong."""
    assert result >= 0, "threads wait for ever"
    assert result == 0, f"{result} instructions were given operands that they do not define"


def encode_map(
    pointer: int, dtype: str, extents: tuple[int, int, int], strides: tuple[int, int], box: tuple[int, int, int]
) -> bytes:
    """What `tensor_map.encode` returns, for `TensorMap` of ptx_sm90.cuh (host); holds its caller to the same limits."""
    size = _ELEMENT_BYTES[dtype]
    swizzled = dtype != "uint64"
    assert pointer % 16 == 0 and all(extents) and all(stride % 16 == 0 and stride > 0 for stride in strides)
    assert all(1 <= extent <= 256 for extent in box) and box[0] * size % 16 == 0
    assert not swizzled or box[0] * size <= 128
    return struct.pack("=Q3Q2Q3III", pointer, *extents, *strides, *box, size, swizzled).ljust(128, b"\0")


@dataclass(frozen=True)
class HostKernel:
    """Stands in for `loaded.Kernel` of a Hopper variant.

    left: for each tensor, what the kernel before this one leaves there; it happens as late as the kernel can wait for.
    """

    library: ctypes.CDLL
    seed: int
    left: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def launch(
        self,
        blocks: tuple[int, int, int],
        threads: int,
        stream: int,
        args: tuple,
        *,
        pdl: bool,
        cluster: int,
        smem_bytes: int,
    ) -> None:
        assert smem_bytes >= self.library.smem_bytes()
        assert threads == self.library.threads() and blocks[1:] == (1, 1) and blocks[0] % max(cluster, 1) == 0
        maps, pointers, numbers = args[: len(MAPS)], args[len(MAPS) : len(MAPS) + 4], args[len(MAPS) + 4 :]
        memory = ctypes.create_string_buffer(128 * len(maps) + 64)
        address = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
        ctypes.memmove(address, b"".join(maps), 128 * len(maps))
        words = []
        for tensor, content in self.left:
            assert tensor.is_contiguous() and content.is_contiguous() and tensor.nbytes == content.nbytes
            words += [tensor.data_ptr(), content.data_ptr(), tensor.nbytes]
        check_run(
            self.library.run(
                ctypes.c_void_p(address),
                *(ctypes.c_void_p(pointer) for pointer in pointers),
                (ctypes.c_int * len(numbers))(*numbers),
                *(blocks[0], cluster, self.seed),
                (ctypes.c_uint64 * len(words))(*words),
                len(self.left),
            )
        )
