"""Batch-invariant plans: one order of additions for every M, in whole tiles or in fixed parts of them. No GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import torch

from marlin.errors import UnsupportedError
from marlin.formats.layouts import PackedWeight, pack
from marlin.runtime import Plan, Problem, all_configs, make_plan, tensor_map, why_illegal
from marlin.runtime.config import TileConfig
from marlin.runtime.config_sm90 import WarpgroupConfig
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.explain import explain
from marlin.runtime.invariant import REFERENCE_M, chosen_order, order, why_variant
from marlin.runtime.problem import KINDS
from marlin.testing import tolerance
from tests.cancelling import cancelling_product
from tests.kernel_on_cpu.machine import GPU, HostKernel, built, check_run, encode_map

H100 = DeviceInfo(0, "H100", (9, 0), 132, 232448, 50 << 20, 1830000, 3.35e12)
A100 = DeviceInfo(0, "A100", (8, 0), 108, 166912, 40 << 20, 1410000, 2.039e12)
ALL_M = (1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 100, 128, 257, 300, 1024, 4096, 65536)
LAYERS = ((4096, 4096), (28672, 4096), (4096, 14336), (72, 192), (200, 576), (8, 32), (1032, 4128))


def problem(m: int, n: int, k: int, kind: str = "w4a16_sp24", group_size: int = 32) -> Problem:
    return Problem(m, n, k, group_size, "float16", kind, batch_invariant=True)


@pytest.mark.parametrize("device", [H100, A100], ids=lambda device: device.name)
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_every_m_add_in_one_order_and_cut_no_tile_by_m(kind: str, device: DeviceInfo) -> None:
    for n, k in LAYERS:
        plans = [make_plan(problem(m, n, k, kind), device) for m in ALL_M]
        orders = {order(plan.config, plan.problem) for plan in plans}
        assert orders == {chosen_order(plans[0].problem, device)} and None not in orders
        for plan in plans:
            shape = plan.geometry
            assert (plan.workspace_bytes, plan.num_tickets) == (0, 0)
            if plan.config.cluster:
                assert shape.num_chunks == plan.config.cluster * shape.stripe_chunks
            else:
                assert (shape.grid, shape.num_split_tiles, shape.num_whole_tiles) == (
                    shape.num_m_tiles * shape.num_n_tiles,
                    0,
                    1,
                )


def test_plans_outside_of_the_mode_are_the_same_as_ever() -> None:
    for m in (1, 16, 300):
        plain = make_plan(problem(m, 4096, 4096)._replace(batch_invariant=False), A100)
        assert plain.geometry.num_split_tiles and plain.num_tickets


def test_order_is_of_the_layer_and_not_of_the_problem_that_asks() -> None:
    orders = {chosen_order(problem(m, 6144, 4096), H100) for m in ALL_M}
    assert len(orders) == 1
    assert chosen_order(problem(1, 6144, 4096)._replace(batch_invariant=False), H100) in orders


def test_order_costs_little_over_the_reference_m() -> None:
    for n, k in LAYERS[:3]:
        mine = [explain(problem(m, n, k), H100).estimate_us for m in REFERENCE_M]
        free = [explain(problem(m, n, k)._replace(batch_invariant=False), H100).estimate_us for m in REFERENCE_M]
        assert sum(a / b for a, b in zip(mine, free, strict=True)) / len(mine) < 1.8


def test_why_variant_names_what_depends_on_m() -> None:
    stripes = next(c for c in all_configs(KINDS[0]) if isinstance(c, WarpgroupConfig) and c.cluster == 0)
    four = dataclasses.replace(stripes, cluster=4)
    whole = problem(16, 4096, 4096)
    reason = f"{stripes.tag} shares tiles evenly among the blocks of the grid, so M decides how K is cut."
    assert why_variant(stripes, whole) == reason
    assert why_variant(four, whole) == f"{four.tag} adds parts of a tile in an order that depends on the row."
    with pytest.raises(UnsupportedError) as error:
        make_plan(whole, H100, stripes)
    assert str(error.value) == f"w4a16_sp24: {reason}"
    out = {row.config: row.reason for row in explain(whole, H100).order}
    assert out[stripes.tag] == reason
    chosen = chosen_order(whole, H100)
    for config in all_configs(KINDS[0]):
        other = order(config, whole) not in (None, chosen)
        text = f"{config.tag} adds along K in another order than the one that serves every M of this layer."
        assert (out[config.tag] == text) == (other and why_illegal(config, whole, H100) is None)


def test_explain_says_that_the_mode_is_on() -> None:
    data = explain(problem(16, 4096, 4096), H100).as_dict()
    assert data["problem"]["batch_invariant"] is True


# The kernels' own text on the host: what is grouped how shows there; that instructions of every extent add alike does
# not, and is shown on a GPU (tests/gpu/test_batch_invariant_gpu.py).


def _smallest(family: type, count: int) -> list[TileConfig | WarpgroupConfig]:
    """Of an order that has most configurations, some: small tiles, which the host builds and runs quickly."""
    orders: dict[object, list[TileConfig | WarpgroupConfig]] = {}
    for config in all_configs(KINDS[0]):
        if isinstance(config, family) and (key := order(config, problem(1, 72, 1152))) is not None:
            orders.setdefault(key, []).append(config)
    most = max(orders.values(), key=lambda configs: (len(configs) >= count, -configs[0].block_m))
    return sorted(most, key=lambda config: config.block_m)[:count]


def _launch_sm80(config: TileConfig, packed: PackedWeight, act: torch.Tensor, folder: Path) -> torch.Tensor:
    plan, out = _plan(config, packed, act)
    library = built(plan.variant, folder)
    numbers = (ctypes.c_int * 10)(*act.shape[:1], packed.n, packed.k, act.stride(0), *plan.geometry[1:])
    tensors = (act, packed.codes, packed.meta, packed.scales, None, out, None, None)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    check_run(library.run(*pointers, numbers, plan.geometry.grid, 0))
    return out


def _launch_sm90(config: WarpgroupConfig, packed: PackedWeight, act: torch.Tensor, folder: Path) -> torch.Tensor:
    plan, out = _plan(config, packed, act)
    launcher = importlib.import_module("marlin.runtime.launch")  # `marlin.runtime.launch` names the function
    at = {"act": act, "codes": packed.codes, "meta": packed.meta, "scales": packed.scales, "out": out}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "kernel", lambda *_: HostKernel(built(plan.variant, folder), 0, ()))
        patch.setattr(launcher, "_launchers", {})
        patch.setattr(tensor_map, "encode", encode_map)
        pointers = {name: tensor.data_ptr() for name, tensor in at.items()}
        launcher.launch(plan, **pointers, bias=0, workspace=0, tickets=0, lda=act.stride(0), stream=0)
    return out


def _plan(config: TileConfig | WarpgroupConfig, packed: PackedWeight, act: torch.Tensor) -> tuple[Plan, torch.Tensor]:
    whole = Problem(act.shape[0], packed.n, packed.k, packed.group_size, "float16", packed.kind, True)
    return make_plan(whole, GPU, config), torch.full((act.shape[0], packed.n), torch.nan, dtype=act.dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")
@pytest.mark.parametrize("family", [TileConfig, WarpgroupConfig], ids=["sm80", "sm90"])
def test_kernel_text_gives_rows_the_same_bits_whatever_tile_and_m(family: type, tmp_path: Path) -> None:
    configs, launch = _smallest(family, 2), _launch_sm80 if family is TileConfig else _launch_sm90
    assert len(configs) == 2
    act, weight = cancelling_product(19, 72, 1152, 32, KINDS[0])
    packed = pack(weight)
    expected = launch(configs[0], packed, act, tmp_path)
    tolerance.check(expected, act, weight)
    for config in configs:
        for rows in ([0], [18, 3], list(range(18, -1, -1))):
            assert torch.equal(launch(config, packed, act[rows], tmp_path), expected[rows]), f"{config.tag} {rows}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")
def test_other_orders_show_in_the_bits_of_such_products(tmp_path: Path) -> None:
    act, weight = cancelling_product(3, 72, 1152, 32, KINDS[0])
    packed, outs = pack(weight), {}
    for config in all_configs(KINDS[0]):
        if isinstance(config, TileConfig) and config.block_m <= 64:
            outs.setdefault(config.warps_k, _launch_sm80(config, packed, act, tmp_path))
    different = [(first != second).float().mean() for first in outs.values() for second in outs.values()]
    assert len(outs) > 1 and sum(share > 0.5 for share in different) == len(outs) * (len(outs) - 1)
