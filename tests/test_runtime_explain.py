"""Explanations of a choice: the floor, the order, and what is shown as chosen."""

from __future__ import annotations

import pytest

from marlin.errors import UnsupportedError
from marlin.runtime import Problem, candidates, make_plan
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.explain import explain, floor

H100 = DeviceInfo(0, "H100", (9, 0), 132, 232448, 50 << 20, 1830000, 3.35e12)
A100 = DeviceInfo(0, "A100", (8, 0), 108, 166912, 40 << 20, 1410000, 2.039e12)


def problem(m: int, kind: str = "w4a16_sp24") -> Problem:
    return Problem(m, 4096, 8192, 128, "float16", kind)


def test_floor_is_bytes_at_small_m_and_arithmetic_at_large() -> None:
    small = floor(problem(16), H100)
    assert small.bound == "memory" and small.us == small.memory_us
    assert small.memory_us == pytest.approx((problem(16).weight_bytes + 2 * 16 * (4096 + 8192)) / 3.35e12 * 1e6)
    large = floor(problem(8192), H100)
    assert large.bound == "tensor cores" and large.us == large.tensor_us
    # 989 dense, 1979 sparse TFLOP/s by the data sheet, at 1830 MHz.
    assert large.tensor_us == pytest.approx(2 * 8192 * 4096 * 8192 / 1978.9e12 * 1e6, rel=1e-3)
    assert floor(problem(8192, "w4a16_dense"), H100).tensor_us == pytest.approx(2 * large.tensor_us)
    assert floor(problem(8192, "w4a16_dense"), A100).tensor_us == pytest.approx(
        2 * 8192 * 4096 * 8192 / 311.9e12 * 1e6, rel=1e-3
    )


def test_floor_of_an_unlisted_architecture_is_that_of_the_newest_before_it() -> None:
    later = DeviceInfo(0, "later", (10, 3), 132, 232448, 50 << 20, 1830000, 3.35e12)
    listed = DeviceInfo(0, "listed", (10, 0), 132, 232448, 50 << 20, 1830000, 3.35e12)
    assert floor(problem(64), later) == floor(problem(64), listed)


@pytest.mark.parametrize("m", [1, 16, 100, 4096])
@pytest.mark.parametrize("device", [H100, A100], ids=["h100", "a100"])
def test_explain_is_the_plan_and_everything_it_was_chosen_from(m: int, device: DeviceInfo) -> None:
    found, plan = explain(problem(m), device), make_plan(problem(m), device)
    assert found.plan == plan and found.chosen.config == plan.config.tag
    assert found.chosen.kernel == plan.variant.name and found.chosen.us == found.estimate_us >= found.floor.us
    tiles = [row.config for row in found.order if "cuBLAS" not in f"{row.kernel} {row.config}"]
    assert tiles == [row.config.tag for row in candidates(problem(m), device)] and len(found.order) == len(tiles) + 1
    times = [row.us for row in found.runners_up if row.us is not None]
    assert times == sorted(times) and len(times) == len(found.runners_up)
    assert found.chosen not in found.runners_up
    for row in found.order:
        assert (row.kernel is None) == (row.us is None) == (row.reason is not None)


def test_explain_as_a_dictionary_has_one_chosen_line() -> None:
    found = explain(problem(16), H100)
    data = found.as_dict()
    assert [row["config"] for row in data["candidates"] if row["chosen"]] == [found.plan.config.tag]
    assert data["floor_us"] == max(data["floor"]["memory_us"], data["floor"]["tensor_us"])
    assert data["problem"] == {
        "m": 16,
        "n": 4096,
        "k": 8192,
        "group_size": 128,
        "dtype": "float16",
        "kind": "w4a16_sp24",
        "batch_invariant": False,
    }


def test_explain_refuses_what_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"^w4a16_sp24: K must be a positive multiple of 32; got K=100\. Pad"):
        explain(Problem(1, 64, 100, 128, "float16", "w4a16_sp24"), H100)
    with pytest.raises(UnsupportedError, match=r"compute capability 8\.0 or newer; got 7\.5"):
        explain(problem(1), DeviceInfo(0, "T4", (7, 5), 40, 65536, 4 << 20, 1590000, 3.2e11))
