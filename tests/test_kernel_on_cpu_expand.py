"""The kernel that expands packed rows, built for the host with g++: bit for bit what `to_dense` gives.

Proves fragment order, tails, cuts into slabs and the exchange through shared memory without a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from marlin.formats.layouts import PackedWeight, pack, unpack
from marlin.runtime.config import GROUP_SIZES
from marlin.runtime.expansion import ExpandVariant, grid
from marlin.runtime.problem import KINDS
from marlin.testing.cases import random_weight
from marlin.testing.emulator import fill_padding
from tests.kernel_on_cpu.machine import Fault, built, check_run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")

_DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def _library(packed: PackedWeight, folder: Path, *fault: Fault) -> ctypes.CDLL:
    name = str(packed.scales.dtype).removeprefix("torch.")
    return built(ExpandVariant(packed.kind, name, packed.group_size), folder, *fault)


def _expand(library: ctypes.CDLL, packed: PackedWeight, first_tile: int, rows: int, seed: int) -> torch.Tensor:
    """Rows 64 * first_tile on, [rows, K], after the memory around them was found untouched."""
    guard = 64 * packed.k  # elements on either side
    space = torch.full((rows * packed.k + 2 * guard,), 7.0, dtype=packed.scales.dtype)
    out = space[guard:-guard].fill_(torch.nan)
    tensors = (packed.codes[first_tile:], packed.meta if packed.meta is None else packed.meta[first_tile:])
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*tensors, packed.scales[first_tile:])]
    check_run(library.run(*pointers, ctypes.c_void_p(out.data_ptr()), rows, packed.k, grid(rows, packed.k), seed))
    assert bool((space[:guard] == 7).all() and (space[-guard:] == 7).all()), "written outside of the output"
    return out.view(rows, packed.k)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


# The least, a row of tiles and a part of one, odd numbers of tiles, more columns than a block has.
@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_expanded_rows_are_the_weight_bit_for_bit(kind: str, group_size: int, dtype: torch.dtype, folder: Path) -> None:
    group = max(group_size, 32)
    for seed, (n, k) in enumerate([(8, group), (72, 3 * group), (200, 5 * group)]):
        packed = fill_padding(pack(random_weight(n, k, group_size, kind, dtype=dtype, seed=seed)), 0xFF)
        library, dense = _library(packed, folder), unpack(packed).to_dense(dtype)
        assert torch.equal(_bits(_expand(library, packed, 0, n, seed)), _bits(dense))
        for first in range(1, packed.codes.shape[0]):
            rows = min(128, n - 64 * first)
            found = _expand(library, packed, first, rows, seed)
            assert torch.equal(_bits(found), _bits(dense[64 * first : 64 * first + rows]))


def test_every_group_of_four_goes_where_its_metadata_say(folder: Path) -> None:
    weight = random_weight(64, 64, -1, "w4a16_sp24", dtype=torch.float16)
    legal = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
    weight.positions.copy_(legal[(torch.arange(64)[:, None] + torch.arange(16)) % 6])
    weight.codes.copy_(torch.arange(64 * 32).view(64, 32) % 16 - 8)
    weight.scales.fill_(-0.5)
    packed, dense = pack(weight), weight.to_dense(torch.float16)
    found = _expand(_library(packed, folder), packed, 0, 64, 1)
    # By value: `to_dense` has -0 where nothing is kept and the scale is negative.
    assert torch.equal(found, dense) and not bool(found[dense == 0].view(torch.int16).max() > 0)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("w4a16_sp24", ("0x76u << (nibble * 2 & 24)", "0x76u << (nibble & 24)")),
        ("w4a16_sp24", ("unit.scales[word % 2 % T::kGroups]", "unit.scales[0]")),
        ("w4a16_sp24", ("pair * 8 + hi * 16", "pair * 8")),
        ("w4a16_dense", ("unit.scales[step / 2 % T::kGroups]", "unit.scales[0]")),
        ("w4a16_dense", ("row < args.rows && ", "")),
        ("w4a16_dense", (" && column < args.k", "")),
        ("w4a16_dense", ("    __syncwarp();\n#pragma unroll", "#pragma unroll")),
        ("w4a16_dense", ("    }\n    __syncwarp();\n}", "    }\n}")),
    ],
    ids=["place", "group-sparse", "row", "group-dense", "rows", "columns", "written", "read"],
)
def test_host_build_shows_planted_faults(kind: str, fault: Fault, folder: Path) -> None:
    weight = random_weight(136, 416, 32, kind, dtype=torch.float16, seed=5)
    packed = pack(weight)
    library = _library(packed, folder, fault)
    with pytest.raises(AssertionError):
        for seed in range(4):
            found = _expand(library, packed, 0, 136, seed)
            assert torch.equal(_bits(found), _bits(weight.to_dense(torch.float16)))
