"""The Hopper kernel's own text, built for the host with g++ and launched as on a GPU (kernel_on_cpu/ptx_sm90.cuh).

Proves what test_kernel_on_cpu.py does, and the tensor maps, the barriers of the ring, the waits for asynchronous
products and copies, the sums over a cluster, and what may be touched before the kernel before this one has ended.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marlin.formats import Weight
from marlin.formats.layouts import pack
from marlin.runtime import tensor_map
from marlin.runtime.config import GROUP_SIZES, all_configs
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.plan import make_plan
from marlin.runtime.problem import DTYPES, KINDS, Problem
from marlin.runtime.source import Variant
from marlin.testing import tolerance
from marlin.testing.cases import random_weight
from tests.kernel_on_cpu.machine import GPU, Fault, HostKernel, built, encode_map

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")

# Why so: `marlin.runtime.launch` names the function.
_launch = importlib.import_module("marlin.runtime.launch")
_CONFIGS = [config for config in all_configs("w4a16_sp24") if isinstance(config, WarpgroupConfig)]


def _variants() -> list[Variant]:
    """Every config, every fourth with both kinds; kinds, dtypes and group sizes take turns so that all pairs occur."""
    result = []
    for i, config in enumerate(_CONFIGS):
        dtype, group_size = DTYPES[i // 2 % 2], GROUP_SIZES[(i + i // 4) % 4]
        result.append(Variant(KINDS[i % 2], dtype, group_size, config))
        if i % 4 == 0:
            result.append(Variant(KINDS[(i + 1) % 2], dtype, group_size, config))
    return result


def _config(cluster: int, block_m: int) -> WarpgroupConfig:
    return next(config for config in _CONFIGS if config.cluster == cluster and config.block_m == block_m)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def _host_maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensor maps for the host, none of which outlives the test in a cache of the launcher."""
    caches = [value.cache_clear for value in vars(_launch).values() if hasattr(value, "cache_clear")]
    for clear in caches:
        clear()
    monkeypatch.setattr(tensor_map, "encode", encode_map)
    yield
    for clear in caches:
        clear()


def _random_act(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A row stride that is not K, and NaN in what lies between rows."""
    act = torch.full((m, k + 8), torch.nan, dtype=dtype)[:, :k]
    return act.copy_(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)))


def _run(
    variant: Variant,
    act: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    seed: int,
    folder: Path,
    *fault: Fault,
) -> torch.Tensor:
    """out of one launch. Activations come, and whatever was written to the rest goes, with the kernel before it."""
    packed, config = pack(weight), variant.config
    m, k = act.shape
    plan = make_plan(Problem(m, packed.n, k, packed.group_size, variant.dtype, packed.kind), GPU, config)
    assert plan.variant == variant
    rows = act.as_strided((m, act.stride(0)), (act.stride(0), 1))
    late_rows = torch.full_like(rows, torch.nan)
    # Why one token tile more: rows beyond M must stay as they are.
    out = torch.full((m + config.block_m, packed.n), 7.0, dtype=act.dtype)
    workspace = torch.zeros(max(plan.workspace_bytes // 4, 4))
    tickets = torch.full((max(plan.num_tickets, 1),), -1, dtype=torch.int32)
    left_out = out.clone()
    left_out[:m] = torch.nan
    left = (
        (late_rows, rows),
        (out, left_out),
        (workspace, workspace * torch.nan),
        (tickets, torch.zeros_like(tickets)),
    )
    kernel = HostKernel(built(variant, folder, *fault), seed, left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "kernel", lambda *_: kernel)
        _launch.launch(
            plan,
            act=late_rows.data_ptr(),
            codes=packed.codes.data_ptr(),
            meta=0 if packed.meta is None else packed.meta.data_ptr(),
            scales=packed.scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            workspace=workspace.data_ptr(),
            tickets=tickets.data_ptr(),
            lda=act.stride(0),
            stream=0,
        )
    assert not tickets.any(), "tickets must be left zero"
    assert bool((out[m:] == 7).all()), "rows beyond M must be left alone"
    return out[:m]


@pytest.mark.parametrize("variant", _variants(), ids=lambda v: v.entry.removeprefix("sm90_w4a16_"))
def test_hopper_kernel_text_computes_the_product(variant: Variant, folder: Path) -> None:
    config, dtype = variant.config, getattr(torch, variant.dtype)
    group = max(variant.group_size, 64)
    # Fewer columns than a chunk; then several tiles along M and N, all with a tail, and a tail of the last chunk.
    shapes = [(1, 72, group), (config.block_m + 3, 2 * config.block_n - 56, 2 * config.block_k + group)]
    for seed, (m, n, k) in enumerate(shapes):
        weight = random_weight(n, k, variant.group_size, variant.kind, dtype=dtype, seed=seed)
        act = _random_act(m, k, dtype, seed)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype) if seed else None
        tolerance.check(_run(variant, act, weight, bias, seed, folder), act, weight, bias)


@pytest.mark.parametrize("cluster", [0, 2])
def test_hopper_kernel_text_gives_the_same_bits_in_any_order(cluster: int, folder: Path) -> None:
    variant = Variant("w4a16_sp24", "bfloat16", 64, _config(cluster, 16))
    weight = random_weight(136, 1216, 64, "w4a16_sp24", dtype=torch.bfloat16, seed=3)
    act = _random_act(20, 1216, torch.bfloat16, 3)
    outs = [_run(variant, act, weight, None, seed, folder) for seed in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)


# A cluster and a token tile, a kernel text to find, and what to put there: some orders of threads show it.
_FAULTS = {
    "weights": (
        (0, 32),
        "mbarrier_wait(barriers().weights(at.stage), at.parity);\n                prepare",
        "prepare",
    ),
    "tokens": (
        (0, 32),
        "mbarrier_wait(barriers().tokens(at.stage), at.parity);\n#pragma unroll\n            for (int piece",
        "\n#pragma unroll\n            for (int piece",
    ),
    "fragments": ((0, 32), "wgmma_wait<1>();  // products of the piece before", ""),
    "release": (
        (0, 32),
        "if (piece == 0 && left < length) release(at.before());",
        "if (piece == 0 && left > 1) release(at.stage);",
    ),
    "in turn: weights": (
        (1, 128),
        "    mbarrier_wait(barriers().weights(at.stage), at.parity);\n                    fetch",
        "    fetch",
    ),
    "in turn: tokens": (
        (1, 128),
        "mbarrier_wait(barriers().tokens(at.stage), at.parity);\n            at.step();",
        "at.step();",
    ),
    "in turn: release": (
        (1, 128),
        "if (!T::kDrain && i == 0 && left < length) release(before);",
        "if (!T::kDrain && i + 1 == kUnits && left > 1) release(current);",
    ),
    "in turn: meta": (
        (1, 128),
        "wgmma_wait<1>();  // products of the unit",
        "fetch_meta(frag[(i + 1) % 2], buffer, unit((i + 1) % kUnits)); wgmma_wait<1>();  //",
    ),
    "expect": ((0, 32), "T::kFilledBytes - T::kActBytes);", "T::kFilledBytes - T::kActBytes - 128);"),
    "previous": ((0, 32), "wait_for_previous_kernel();\n        at = Segment{};", "at = Segment{};"),
    "parts": ((2, 128), "if constexpr (T::kPartsInRing) sync_cluster();", ""),
    "scratch": ((0, 32), "sync_threads<128 * T::WGS_N>(kBarrierFinishers);  // before", "//"),
}


@pytest.mark.parametrize("name", _FAULTS)
def test_host_build_shows_planted_faults_of_the_hopper_kernel(name: str, folder: Path) -> None:
    place, *fault = _FAULTS[name]
    config = _config(*place)
    variant = Variant("w4a16_sp24", "float16", 64, config)
    m, n, k = config.block_m - 3, 4 * config.block_n - 56, 8 * config.block_k - 64
    weight = random_weight(n, k, 64, variant.kind, dtype=torch.float16, seed=5)
    act = _random_act(m, k, torch.float16, 5)
    built(variant, folder, tuple(fault))
    with pytest.raises(AssertionError):
        for seed in range(12):
            tolerance.check(_run(variant, act, weight, None, seed, folder, tuple(fault)), act, weight)
