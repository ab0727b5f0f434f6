"""Launches of plans: what the kernel is given, packed once and each time, and whose turn shared memory is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from marlin.runtime import tensor_map
from marlin.runtime.config_sm90 import WIDE_SMEM_BYTES
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.plan import Plan, make_plan
from marlin.runtime.problem import Problem

_launch = importlib.import_module("marlin.runtime.launch")  # `marlin.runtime.launch` names the function
H200 = DeviceInfo(0, "NVIDIA H200", (9, 0), 132, 232448, 50 << 20, 1_980_000, 4.8e12)
A100 = DeviceInfo(0, "NVIDIA A100", (8, 0), 108, 166912, 40 << 20, 1_410_000, 1.9e12)
WEIGHT = {"codes": 32, "meta": 48, "scales": 64}
AT = {"act": 16, "bias": 80, "out": 96, "lda": 4096, "stream": 7}


class FakeKernel:
    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, *args: Any, **named: Any) -> None:
        self.launches.append((args, tuple(sorted(named.items()))))

    def freeze(self, *args: Any, **named: Any) -> Callable[[], bool]:
        def again() -> bool:
            self.launch(*args, **named)
            return True

        return again


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(_launch, "kernel", lambda *_: fake)
    monkeypatch.setattr(_launch, "_launchers", {})
    monkeypatch.setattr(_launch, "_wide", False)
    monkeypatch.setattr(tensor_map, "encode", lambda *given: repr(given).encode())
    return fake


def plan_of(device: DeviceInfo) -> Plan:
    return make_plan(Problem(1, 4096, 4096, 128, "float16", "w4a16_sp24"), device)


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
def test_frozen_launches_give_the_kernel_what_launches_do(kernel: FakeKernel, device: DeviceInfo) -> None:
    plan = plan_of(device)
    for work in (
        lambda: _launch.launch(plan, workspace=0, tickets=0, **WEIGHT, **AT),
        _launch.freeze(plan, weight=tuple(WEIGHT.values()), **AT),
    ):
        work()
        work()
    first, second, third, fourth = kernel.launches
    assert (first, second) == (third, fourth)
    assert kernel.launches[0][0][2] == AT["stream"]


def test_frozen_launches_take_their_turn_among_others(kernel: FakeKernel) -> None:
    plan = plan_of(H200)
    assert _launch._Launcher(plan).takes_turns
    again = _launch.freeze(plan, weight=tuple(WEIGHT.values()), **AT)
    for work in (again, lambda: _launch.launch(plan, workspace=0, tickets=0, **WEIGHT, **AT), again, again):
        work()
    sizes = [dict(named)["smem_bytes"] for _, named in kernel.launches]
    assert sizes == [WIDE_SMEM_BYTES, plan.variant.smem_bytes] * 2
