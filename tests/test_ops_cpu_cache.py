"""The fp32 weights that the CPU implementation keeps: while their tensors live, and never for other bytes."""

from __future__ import annotations

import gc

import pytest
import torch

from marlin import ops
from marlin.formats.layouts import PackedWeight, pack
from marlin.testing.cases import random_weight


def make_packed(kind: str, n: int = 72, k: int = 96, seed: int = 0) -> PackedWeight:
    return pack(random_weight(n, k, 32, kind, seed=seed))


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    ops.clear_cpu_cache()


def test_cpu_cache_keeps_one_weight_per_packed_tensor_while_it_lives():
    packed = make_packed("w4a16_sp24")
    act = torch.randn(1, 96).half()
    ops.linear(act, packed)
    held = ops.cpu.cache.nbytes
    assert held == 72 * 96 * 4 + packed.nbytes
    ops.linear(act, packed)
    assert ops.cpu.cache.nbytes == held
    del packed
    gc.collect()
    assert ops.cpu.cache.nbytes == 0


@pytest.mark.parametrize("name", ["codes", "meta", "scales"])
@pytest.mark.parametrize("through", ["tensor", "data", "numpy"])
def test_cpu_cache_sees_every_change_in_place(name, through):
    packed, other = make_packed("w4a16_sp24"), make_packed("w4a16_sp24", seed=1)
    act = torch.randn(3, 96).half()
    ops.linear(act, packed)
    target, source = getattr(packed, name), getattr(other, name)
    assert not torch.equal(target, source)
    if through == "tensor":
        target.copy_(source)
    elif through == "data":
        target.data.copy_(source)
    else:
        target.numpy()[...] = source.numpy()
    changed = ops.linear(act, packed)
    ops.clear_cpu_cache()
    assert torch.equal(changed, ops.linear(act, packed))


def test_cpu_cache_keeps_views_as_long_as_the_tensor_below():
    packed = make_packed("w4a16_dense")
    flat = packed.codes.flatten()
    view = PackedWeight(packed.kind, flat.view_as(packed.codes), None, packed.scales, 72, 96, 32)
    ops.linear(torch.randn(1, 96).half(), view)
    del view, packed
    assert ops.cpu.cache.nbytes > 0
    del flat
    gc.collect()
    assert ops.cpu.cache.nbytes == 0


def test_cpu_cache_keeps_nothing_beyond_its_limit(monkeypatch):
    packed, act = make_packed("w4a16_sp24"), torch.randn(3, 96).half()
    expected = ops.linear(act, packed)
    ops.clear_cpu_cache()
    monkeypatch.setenv("MARLIN_CPU_CACHE_MB", "0")
    assert torch.equal(ops.linear(act, packed), expected)
    assert ops.cpu.cache.nbytes == 0


def test_cpu_cache_makes_room_only_from_idle_weights(monkeypatch):
    monkeypatch.setenv("MARLIN_CPU_CACHE_MB", "1")
    first, second = make_packed("w4a16_dense", 256, 640), make_packed("w4a16_dense", 264, 640)
    act = torch.randn(1, 640).half()
    ops.linear(act, first)
    held = ops.cpu.cache.nbytes
    ops.linear(act, second)
    assert ops.cpu.cache.nbytes == held
    monkeypatch.setattr(ops.cpu.cache, "min_idle_seconds", 0.0)
    ops.linear(act, second)
    assert ops.cpu.cache.nbytes == 264 * 640 * 4 + second.nbytes


def test_cpu_cache_refuses_a_limit_that_is_no_number(monkeypatch):
    monkeypatch.setenv("MARLIN_CPU_CACHE_MB", "lots")
    with pytest.raises(ValueError) as caught:
        ops.linear(torch.randn(1, 96).half(), make_packed("w4a16_sp24"))
    assert str(caught.value) == "MARLIN_CPU_CACHE_MB: the limit must be a whole number of MiB; got 'lots'."
