"""Batch-invariant mode on the GPU: the bits of a row, whatever M and whatever the other rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.tiles import launcher
from marlin import ops, runtime, settings
from marlin.formats.layouts import PackedWeight, pack
from marlin.runtime.invariant import Order, order
from marlin.testing import tolerance
from marlin.testing.cases import DTYPES, KINDS, random_act, random_weight
from tests.cancelling import cancelling_product

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ALL_M = (1, 2, 7, 16, 17, 64, 65, 128, 300, 1024)
# (n, k, group_size): layers of language models, small and odd ones, and one that Hopper's own kernels do not take.
LAYERS = ((4096, 4096, 128), (28672, 1024, -1), (512, 8192, 64), (200, 1152, 32), (72, 256, 64), (264, 4128, 32))


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    before = settings.batch_invariant()
    settings.set_batch_invariant(True)
    yield
    settings.set_batch_invariant(before)


def _case(kind: str, layer: tuple[int, int, int], dtype: torch.dtype) -> tuple[PackedWeight, torch.Tensor]:
    n, k, group_size = layer
    if k % 128:
        weight = random_weight(n, k, group_size, kind, dtype=dtype, device=DEVICE)
        return pack(weight), random_act(max(ALL_M), k, dtype=dtype, device=DEVICE)
    act, weight = cancelling_product(max(ALL_M), n, k, group_size, kind, dtype, DEVICE)
    return pack(weight), act


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_bits_whatever_m_and_the_other_rows(
    kind: str, dtype: torch.dtype, layer: tuple[int, int, int]
) -> None:
    packed, act = _case(kind, layer, dtype)
    bias = random_act(1, layer[0], dtype=dtype, device=DEVICE, seed=7)[0]
    expected = ops.linear(act, packed, bias)
    for m in ALL_M:
        assert torch.equal(ops.linear(act[:m], packed, bias), expected[:m]), f"the first {m} rows"
        rows = torch.randperm(act.shape[0], device=DEVICE)[:m]
        assert torch.equal(ops.linear(act[rows], packed, bias), expected[rows]), f"{m} other rows"
    # Rows that nothing may mix with: what is beside the first row changes none of its bits.
    loud = act[:17].clone()
    loud[1:] = torch.inf
    assert torch.equal(ops.linear(loud, packed, bias)[0], expected[0])


def _run(plan: runtime.Plan, packed: PackedWeight, act: torch.Tensor) -> torch.Tensor:
    out = torch.full((act.shape[0], packed.n), torch.nan, dtype=act.dtype, device=DEVICE)
    assert not plan.num_tickets and not plan.workspace_bytes
    launcher(plan, (torch.empty(0, device=DEVICE), torch.empty(0, device=DEVICE)))(packed, act, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_tiles_of_an_order_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    index, (n, k, group_size) = torch.cuda.current_device(), (520, 4096, 128)
    packed, act = _case(kind, (n, k, group_size), dtype)
    act = act[:300]
    name = str(dtype).removeprefix("torch.")
    problem = runtime.Problem(act.shape[0], n, k, group_size, name, kind, batch_invariant=True)
    device = runtime.plan(problem, index).device
    orders: dict[Order, dict[str, torch.Tensor]] = {}
    for config in runtime.all_configs(kind):
        key = order(config, problem)
        if key is not None and runtime.why_illegal(config, problem, device) is None:
            orders.setdefault(key, {})[config.tag] = _run(runtime.plan(problem, index, config), packed, act)
    assert any(len(outs) > 1 for outs in orders.values())
    different = []
    for key, outs in orders.items():
        (first, expected), *others = outs.items()
        for tag, out in others:
            if not torch.equal(out, expected):
                share = float((out != expected).float().mean())
                different.append(f"{key}: {tag} differs from {first} in {100 * share:.2f} % of the values")
    assert not different, "\n".join(different)


@pytest.mark.parametrize("kind", KINDS)
def test_mode_is_within_the_bound_and_repeats(kind: str) -> None:
    for m, n, k, group_size in ((1, 4096, 4096, 128), (100, 200, 1152, 32), (1000, 520, 640, 64), (17, 264, 4128, 32)):
        weight = random_weight(n, k, group_size, kind, device=DEVICE)
        packed, act = pack(weight), random_act(m, k, device=DEVICE)
        out = ops.linear(act, packed)
        tolerance.check(out, act, weight, name=f"{kind} {m} {n} {k}")
        assert all(torch.equal(ops.linear(act, packed), out) for _ in range(20))


def test_mode_is_that_of_the_call_and_of_the_capture() -> None:
    """The choice follows the switch at once, and a graph keeps that of its capture."""
    packed, act = _case("w4a16_sp24", LAYERS[0], torch.float16)
    act = act[:64]
    fixed = ops.linear(act, packed)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(fixed)
    with torch.cuda.graph(graph):
        ops.linear_out(act, packed, out)
    settings.set_batch_invariant(False)
    ops.linear(act, packed)
    graph.replay()
    assert torch.equal(out, fixed)
    settings.set_batch_invariant(True)
    assert torch.equal(ops.linear(act, packed), fixed)
