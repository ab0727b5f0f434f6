"""Expanded products: the cut into slabs, when the way is chosen, and what the launcher passes on. No GPU."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from marlin.runtime import Problem, make_plan
from marlin.runtime.catalog import all_kernels
from marlin.runtime.cost import cost_us
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.expansion import (
    MAX_SLAB_BYTES,
    MIN_M,
    Slab,
    all_expand_variants,
    cublas_us,
    cut,
    expand_us,
    expansion,
    grid,
    why_not,
    worthwhile,
)
from marlin.runtime.explain import explain
from marlin.runtime.problem import KINDS
from marlin.runtime.source import ARCHS, all_variants

H200 = DeviceInfo(0, "NVIDIA H200", (9, 0), 132, 232448, 60 << 20, 1_980_000, 4.917e12)
A100 = DeviceInfo(0, "NVIDIA A100", (8, 0), 108, 166912, 40 << 20, 1_410_000, 1.9e12)
LARGE = Problem(4096, 28672, 4096, 128, "float16", "w4a16_dense")
GEMM = Path(__file__).parent.parent / "benchmarks" / "records" / "gemm-nvidia-h200.json"
_launch = importlib.import_module("marlin.runtime.launch")  # `marlin.runtime.launch` names the function


@pytest.mark.parametrize("max_bytes", [1, 1 << 20, 8 << 20, MAX_SLAB_BYTES])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (72, 96), (4096, 4096), (6152, 4096), (28672, 4096), (4096, 14336)])
def test_slabs_cover_every_row_once_on_tiles_within_the_limit(n: int, k: int, max_bytes: int) -> None:
    slabs = cut(n, k, max_bytes)
    assert [slab.first for slab in slabs] == [sum(s.rows for s in slabs[:i]) for i in range(len(slabs))]
    assert sum(slab.rows for slab in slabs) == n and all(slab.rows > 0 and slab.first % 64 == 0 for slab in slabs)
    largest = max(slab.rows for slab in slabs)
    assert largest * k * 2 <= max_bytes or largest <= 64
    # As few as fit, and of one size: the last one makes up for the rounding.
    assert len(slabs) <= -(-n // max(64, max_bytes // (2 * k) // 64 * 64))
    assert len({slab.rows for slab in slabs[:-1]}) <= 1


def test_slabs_are_whole_tiles_of_cublas_where_the_limit_allows() -> None:
    assert cut(6144, 4096) == (Slab(0, 6144),) and cut(4096, 14336) == (Slab(0, 2048), Slab(2048, 2048))
    assert cut(28672, 4096) == tuple(Slab(first, 7168) for first in range(0, 28672, 7168))
    assert cut(28672, 4096, more=3) == tuple(Slab(first, 4096) for first in range(0, 28672, 4096))
    assert cut(6144, 4096, 32 << 20) == (Slab(0, 3072), Slab(3072, 3072))
    assert cut(3000, 4096, 16 << 20) == (Slab(0, 1536), Slab(1536, 1464))
    assert cut(3000, 14336, 4 << 20) == tuple(Slab(at, min(128, 3000 - at)) for at in range(0, 3000, 128))


def test_expand_variants_have_entries_of_their_own_and_are_built_ahead() -> None:
    entries = [kernel.entry for kernel in all_kernels()]
    assert len(entries) == len(set(entries)) >= len(all_variants()) + len(all_expand_variants())
    for variant in all_expand_variants():
        assert [variant.target(arch) for arch in ARCHS] == list(ARCHS)
        text = variant.render()
        assert "#include" not in text and text.count('extern "C" __global__') == 1 and variant.entry in text


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_expanded_where_that_is_clearly_faster(kind: str) -> None:
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        for m in (1, 16, 64, 128, 256, 512, 1024, 4096, 65536):
            problem = Problem(m, n, k, 128, "float16", kind)
            plan = make_plan(problem, H200, portable=True)
            launched = cost_us(plan.config, problem, H200)
            assert plan.config.family == "sm80"
            if plan.expansion is not None:
                assert plan.expansion.us < launched and m >= MIN_M
                assert plan.expansion == expansion(problem, H200)
            if m >= 1024:
                assert plan.expansion is not None, "the portable kernels take 1.5 times as long as cuBLAS there"
            if m <= 64:
                assert plan.expansion is None


def test_model_of_cublas_follows_the_times_it_is_fitted_to() -> None:
    rows = json.loads(GEMM.read_text())["rows"]
    rows = [row for row in rows if row["impl"] == "cublas" and row["dtype"] == "float16" and row["m"] >= MIN_M]
    assert len(rows) > 20
    errors = [
        math.log(cublas_us(row["m"], row["n"], row["k"], H200) / row["us"])
        for row in {(row["m"], row["n"], row["k"]): row for row in rows}.values()
    ]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.06
    assert max(map(abs, errors)) < 0.15


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
def test_slabs_are_those_that_cost_least(device: DeviceInfo) -> None:
    for m in (128, 300, 1024, 8192):
        for n, k in ((6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (72, 96)):
            problem = Problem(m, n, k, -1, "bfloat16", "w4a16_sp24")
            found = expansion(problem, device)
            for more in (0, 1, 3):
                slabs = cut(n, k, more=more)
                us = sum(expand_us(problem, slab, device) + cublas_us(m, slab.rows, k, device) for slab in slabs)
                assert found.us <= us + 1e-9
            assert found.slab_bytes <= MAX_SLAB_BYTES


def test_a_slab_that_stays_in_l2_is_written_faster() -> None:
    rows = {count: Slab(0, count) for count in (1024, 4096, 6144)}  # 8, 32 and 48 MiB; L2 is 60 MiB
    us = {count: expand_us(LARGE, slab, H200) for count, slab in rows.items()}
    assert us[4096] < 4 * us[1024] and us[6144] > 1.5 * us[4096]


def test_expanding_is_refused_with_a_reason() -> None:
    assert why_not(LARGE, "sm80") is None
    assert why_not(LARGE, "sm90") == "sm90 kernels are faster than expanding."
    invariant = LARGE._replace(batch_invariant=True)
    assert why_not(invariant, "sm80") == "cuBLAS adds along K in an order that depends on M."
    assert why_not(LARGE._replace(m=MIN_M - 1), "sm80") == f"expanding is for M of at least {MIN_M}."
    assert worthwhile(LARGE, A100, "sm80", 1e9) == expansion(LARGE, A100)
    assert worthwhile(LARGE, A100, "sm80", expansion(LARGE, A100).us) is None
    small = LARGE._replace(m=256, n=64, k=128)
    assert expansion(small, A100).us < 10 and worthwhile(small, A100, "sm80", 19.0) is None
    for problem, device in ((LARGE, H200), (invariant, A100)):
        assert make_plan(problem, device).expansion is None
    assert make_plan(LARGE, A100).expansion is not None
    chosen = make_plan(LARGE, A100)
    assert make_plan(LARGE, A100, chosen.config).expansion is None, "a configuration that is asked for runs"


def test_portable_plans_choose_among_the_kernels_of_every_gpu() -> None:
    problem = LARGE._replace(m=16)
    assert make_plan(problem, H200).config.family == "sm90"
    plan = make_plan(problem, H200, portable=True)
    assert plan.config.family == "sm80" and plan.runs == f"sm80_w4a16_dense {plan.config.tag}"
    assert make_plan(problem, A100, portable=True) == make_plan(problem, A100)


def test_explain_names_the_expanded_product() -> None:
    found = explain(LARGE, A100)
    expanded = found.plan.expansion
    assert expanded is not None and found.chosen.us == found.estimate_us == expanded.us
    rows = expanded.slab_rows
    assert found.chosen.kernel == "sm80_expand_w4a16_dense + cuBLAS"
    assert found.chosen.config == f"{len(expanded.slabs)}x{rows}"
    assert f"{found.chosen.kernel} {found.chosen.config}" == found.plan.runs
    data = found.as_dict()
    assert data["entry"] == "sm80_expand_w4a16_dense_fp16_g128"
    assert data["slabs"] == [slab.rows for slab in expanded.slabs] and sum(data["slabs"]) == LARGE.n
    assert data["grid"] == grid(rows, 4096) == rows // 64 * 32
    assert (data["threads"], data["smem_bytes"], data["workspace_bytes"]) == (128, 8192, 2 * rows * 4096)
    assert data["workspace_bytes"] <= MAX_SLAB_BYTES
    assert sum(row["chosen"] for row in data["candidates"]) == 1
    for problem, device in ((LARGE, H200), (LARGE._replace(m=1), A100)):
        other = explain(problem, device)
        row = next(row for row in other.order if row.config == "expand + cuBLAS")
        assert (row.kernel, row.us) == (None, None) and row.reason == why_not(problem, other.plan.config.family)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_launcher_points_at_the_slab(monkeypatch: pytest.MonkeyPatch, kind: str, group_size: int) -> None:
    seen: list[Any] = []

    class Kernel:
        def launch(self, *args: Any) -> None:
            seen.append(args)

    monkeypatch.setattr(_launch, "_expand_kernel", lambda variant, arch, index: Kernel())
    monkeypatch.setattr(_launch.compiler, "arch_for", lambda arch: "80")
    problem = Problem(4096, 200, 96, group_size, "float16", kind)
    plan = make_plan(problem, A100)._replace(expansion=expansion(problem, A100))
    sparse = kind == "w4a16_sp24"
    meta = 1 << 30 if sparse else 0
    _launch.expand(plan, Slab(128, 72), codes=1 << 20, meta=meta, scales=1 << 40, out=7, stream=5)
    ((blocks, threads, stream, (codes, meta, scales, out, rows, k)),) = seen
    assert (blocks, threads, stream) == ((2, 1, 1), 128, 5)
    assert codes - (1 << 20) == 2 * 2 * 4 * (256 if sparse else 512)
    assert meta == ((1 << 30) + 2 * 2 * 512 if sparse else 0)
    assert scales - (1 << 40) == 2 * (1 if group_size == -1 else 3) * 128
    assert (out, rows, k) == (7, 72, 96)
