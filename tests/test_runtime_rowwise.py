"""Kernels between products: variants, the cut into blocks, and what the launcher passes on. No GPU."""

from __future__ import annotations

from typing import Any

import pytest

from marlin.errors import LaunchError
from marlin.ops import rowwise as operators
from marlin.runtime import rowwise
from marlin.runtime.build import build_all
from marlin.runtime.catalog import all_kernels
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.rowwise import MAX_HIDDEN, OPS, all_rowwise_variants, make_rowwise_plan
from marlin.runtime.source import ARCHS

H200 = DeviceInfo(0, "NVIDIA H200", (9, 0), 132, 232448, 60 << 20, 1_980_000, 4.917e12)
A100 = DeviceInfo(0, "NVIDIA A100", (8, 0), 108, 166912, 40 << 20, 1_410_000, 1.9e12)
B200 = DeviceInfo(0, "NVIDIA B200", (10, 0), 148, 232448, 60 << 20, 1_980_000, 8e12)


def test_variants_have_entries_of_their_own_and_are_built_ahead() -> None:
    entries = [kernel.entry for kernel in all_kernels()]
    assert len(entries) == len(set(entries))
    assert set(all_rowwise_variants()) <= set(all_kernels())
    assert {variant.kind for variant in all_rowwise_variants()} == set(OPS) == set(operators._OPERATORS)
    for variant in all_rowwise_variants():
        assert [variant.target(arch) for arch in ARCHS] == [
            arch if not variant.early or arch == "90" else None for arch in ARCHS
        ]
        text = variant.render()
        assert "#include" not in text and text.count('extern "C" __global__') == 1 and variant.entry in text


def test_no_kernel_spills_and_the_early_ones_say_so() -> None:
    rows = build_all(all_rowwise_variants(), ["80", "90"], 1, store=False)
    assert len(rows) == len(all_rowwise_variants()) * 3 // 2
    for row in rows:
        assert row.problems == (), row.entry
        assert row.threads * (-(-(row.registers or 0) // 8) * 8) <= 65536, row.entry


def test_limits_are_those_that_the_operators_check() -> None:
    assert (rowwise.ROW_MULTIPLE, MAX_HIDDEN) == (operators.MULTIPLE, operators.MAX_HIDDEN)


def test_kernels_start_early_on_hopper_alone() -> None:
    assert make_rowwise_plan("rms_norm", 1, 4096, "float16", H200, early=True).variant.early
    assert not make_rowwise_plan("rms_norm", 1, 4096, "float16", H200, early=False).variant.early
    for device in (A100, B200):
        assert not make_rowwise_plan("rms_norm", 1, 4096, "float16", device, early=True).variant.early


@pytest.mark.parametrize("op", OPS)
def test_blocks_cover_every_piece_of_every_row(op: str) -> None:
    for rows in (1, 7, 64, 8192):
        for width in (8, 264, 1536, 4096, 4104, 8200, 14336, 32768):
            plan = make_rowwise_plan(op, rows, width, "bfloat16", H200)
            assert plan.grid == rows * plan.blocks_of_a_row and plan.threads % 32 == 0
            assert plan.threads <= plan.variant.threads
            covered = plan.blocks_of_a_row * plan.threads * plan.variant.pieces * 8
            assert width <= covered
            # No block is without work.
            assert width > covered - plan.threads * plan.variant.pieces * 8


def test_the_order_of_a_norm_does_not_depend_on_the_number_of_rows() -> None:
    for width in (264, 4096, 5120, 14336):
        plans = {make_rowwise_plan("fused_add_rms_norm", rows, width, "float16", H200)[2:] for rows in (1, 16, 8192)}
        variants = {make_rowwise_plan("fused_add_rms_norm", rows, width, "float16", H200).variant for rows in (1, 8192)}
        assert len(plans) == len(variants) == 1


def test_too_many_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise.driver, "device_info", lambda index: H200)
    text = "rms_norm: a launch must have at most 2147483647 blocks; got 2147483648. Pass fewer rows at a time."
    with pytest.raises(LaunchError) as raised:
        rowwise.rowwise_plan("rms_norm", 2**31, 8, "float16", 0)
    assert str(raised.value) == text


class FakeKernel:
    """Keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def launch(self, *args: Any, **named: Any) -> None:
        self.launches.append((args, named))


def test_launches_fit_the_signature_and_carry_the_attribute_where_kernels_wait() -> None:
    for early in (True, False):
        kernel: Any = FakeKernel()
        norm = make_rowwise_plan("fused_add_rms_norm", 3, 4096, "float16", H200, early=early)
        norm.norm(kernel, (1, 2, 3, 4, 5), (4096, 6144), 1e-6, 77)
        silu = make_rowwise_plan("silu_and_mul", 3, 14336, "float16", H200, early=early)
        silu.silu_and_mul(kernel, 1, 2, 28672, 77)
        assert kernel.launches == [
            (((3, 1, 1), 512, 77, (1, 2, 3, 4, 5, 4096, 4096, 6144, 1e-6)), {"pdl": early}),
            (((42, 1, 1), 128, 77, (1, 2, 14336, 28672, 14)), {"pdl": early}),
        ]
        for plan, ((_, _, _, args), _) in zip((norm, silu), kernel.launches, strict=True):
            assert len(args) == len(plan.variant.signature)


def test_kernels_are_loaded_once_with_the_carve_out_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(rowwise.driver, "device_info", lambda index: H200)
    monkeypatch.setattr(rowwise.compiler, "arch_for", lambda capability: "90")
    monkeypatch.setattr(rowwise.cache, "get_cubin", lambda text, *, name, arch: b"code")
    monkeypatch.setattr(
        rowwise.loaded, "load_kernel", lambda *args, **named: loaded.append((args, named)) or FakeKernel()
    )
    rowwise._kernel.cache_clear()
    for early in (True, False):
        variant = make_rowwise_plan("rms_norm", 1, 4096, "float16", H200, early=early).variant
        assert rowwise.rowwise_kernel(variant, 0) is rowwise.rowwise_kernel(variant, 0)
    rowwise._kernel.cache_clear()
    assert [named["most_smem"] for _, named in loaded] == [True, False]
    assert [args[1] for args, _ in loaded] == ["sm90_rms_norm_fp16_p1", "sm80_rms_norm_fp16_p1"]
