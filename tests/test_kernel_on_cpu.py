"""The kernels' own text, built for the host with g++ and run thread by thread (kernel_on_cpu/host.h says how).

Proves schedule, pipeline, fragment order, tails, sums over warps and blocks, and the epilogue without a GPU. What it
cannot prove: the hardware's instructions themselves, and races that need two memory accesses at the same instant.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from marlin.formats import Weight
from marlin.formats.layouts import pack
from marlin.runtime.config import TileConfig, all_configs
from marlin.runtime.cost import geometry
from marlin.runtime.plan import make_plan
from marlin.runtime.problem import Problem
from marlin.runtime.source import Variant
from marlin.testing import tolerance
from marlin.testing.cases import random_weight
from tests.kernel_on_cpu.machine import GPU, Fault, built, check_run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")


def _built(
    config: TileConfig, kind: str, dtype: torch.dtype, group_size: int, folder: Path, *fault: Fault
) -> ctypes.CDLL:
    return built(Variant(kind, str(dtype).removeprefix("torch."), group_size, config), folder, *fault)


def _run(
    library: ctypes.CDLL,
    config: TileConfig,
    act: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    seed: int,
    space: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, tickets) of one launch; out, the head of `space` where given, and workspace start as NaN."""
    packed = pack(weight)
    name = str(act.dtype).removeprefix("torch.")
    problem = Problem(act.shape[0], packed.n, packed.k, packed.group_size, name, packed.kind)
    plan, shape = make_plan(problem, GPU, config), geometry(config, problem, GPU)
    out = torch.empty(problem.m, problem.n, dtype=act.dtype) if space is None else space[: problem.m]
    out.fill_(torch.nan)
    workspace = torch.full((max(plan.workspace_bytes // 4, 4),), torch.nan)
    tickets = torch.zeros(max(plan.num_tickets, 1), dtype=torch.int32)
    numbers = (ctypes.c_int * 10)(problem.m, problem.n, problem.k, act.stride(0), *shape[1:])
    tensors = (act, packed.codes, packed.meta, packed.scales, bias, out, workspace, tickets)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    check_run(library.run(*pointers, numbers, shape.grid, seed))
    return out, tickets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


# (config index, kind, dtype, group size): every config, each kind, dtype and group size at least twice.
_VARIANTS = [
    (0, "w4a16_sp24", torch.float16, 128),
    (1, "w4a16_sp24", torch.bfloat16, 64),
    (2, "w4a16_dense", torch.float16, 64),
    (3, "w4a16_sp24", torch.float16, 32),
    (4, "w4a16_dense", torch.bfloat16, -1),
    (5, "w4a16_sp24", torch.bfloat16, -1),
    (6, "w4a16_dense", torch.float16, 32),
    (7, "w4a16_dense", torch.bfloat16, 64),
    (8, "w4a16_sp24", torch.float16, 128),
    (8, "w4a16_dense", torch.float16, -1),
]


@pytest.mark.parametrize("variant", _VARIANTS, ids=lambda v: f"{all_configs(v[1])[v[0]].tag}-{v[1][6:]}-g{v[3]}")
def test_kernel_text_computes_the_product(variant: tuple, folder: Path) -> None:
    index, kind, dtype, group_size = variant
    config = all_configs(kind)[index]
    library = _built(config, kind, dtype, group_size, folder)
    group = max(group_size, 32)
    # Rows: one tile short of full, and several; K: below one chunk, and a tail that splits a tile of 64.
    shapes = [
        (1, 72, 4 * group),
        (config.block_m + 3, 2 * config.block_n - 56, 9 * group if group == 32 else 5 * group),
    ]
    for seed, (m, n, k) in enumerate(shapes):
        weight = random_weight(n, k, group_size, kind, dtype=dtype, seed=seed)
        # A row stride that is not K, and NaN in what lies between rows.
        act = torch.full((m, k + 8), torch.nan, dtype=dtype)[:, :k]
        act.copy_(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)))
        bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype) if seed else None
        out, tickets = _run(library, config, act, weight, bias, seed)
        tolerance.check(out, act, weight, bias)
        assert not tickets.any(), "tickets must be left zero"


def test_kernel_text_gives_the_same_bits_in_any_order_of_blocks(folder: Path) -> None:
    config, kind = all_configs("w4a16_sp24")[1], "w4a16_sp24"
    library = _built(config, kind, torch.bfloat16, 64, folder)
    weight = random_weight(136, 1024, 64, kind, dtype=torch.bfloat16, seed=3)
    act = torch.randn(20, 1024, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    outs = [_run(library, config, act, weight, None, seed)[0] for seed in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_kernel_text_returns_the_weight_for_one_hot_activations(folder: Path) -> None:
    config, kind = all_configs("w4a16_sp24")[0], "w4a16_sp24"
    library = _built(config, kind, torch.float16, 128, folder)
    weight = random_weight(72, 128, 128, kind, dtype=torch.float16, seed=4)
    out, _ = _run(library, config, torch.eye(128, dtype=torch.float16), weight, None, 0)
    assert torch.equal(out, weight.to_dense(torch.float16).T)


def _assert_fault_shows(config: TileConfig, fault: Fault, folder: Path) -> None:
    kind = "w4a16_sp24"
    library = _built(config, kind, torch.float16, 64, folder, fault)
    weight = random_weight(136, 1024, 64, kind, dtype=torch.float16, seed=5)
    m = config.block_m + 4
    act = torch.randn(m, 1024, generator=torch.Generator().manual_seed(5)).half()
    space = torch.full((2 * m, 136), 7.0, dtype=torch.float16)
    with pytest.raises(AssertionError):
        out, tickets = _run(library, config, act, weight, None, 5, space)
        tolerance.check(out, act, weight)
        assert not tickets.any() and bool((space[m:] == 7).all())


@pytest.mark.parametrize(
    "fault",
    [
        ("cp_async_wait<T::STAGES - 2>()", "cp_async_wait<T::STAGES - 1>()"),
        ("            __syncthreads();\n            load_next", "            load_next"),
        ("block0 + i == first", "false"),
        ("token < args.m && feature", "feature"),
        ("args.tickets[tile] = 0;", ";"),
    ],
    ids=["wait", "barrier", "sum-start", "tail", "ticket"],
)
def test_host_build_shows_planted_faults(fault: Fault, folder: Path) -> None:
    _assert_fault_shows(all_configs("w4a16_sp24")[1], fault, folder)


@pytest.mark.parametrize(
    "fault",
    [
        ("                cp_async_wait<T::STAGES - 3>();", ""),
        ("                __syncthreads();\n                copy_next", "                copy_next"),
        ("buffer == 0 ? T::STAGES - 1 : buffer - 1", "buffer"),
        ("fetch_codes(next, th);", "fetch_codes(stage, th);"),
        ("meta[f][0] = next_meta[f][0];", ";"),
    ],
    ids=["wait", "barrier", "buffer", "codes", "meta"],
)
def test_host_build_of_many_tokens_shows_planted_faults(fault: Fault, folder: Path) -> None:
    _assert_fault_shows(all_configs("w4a16_sp24")[6], fault, folder)
