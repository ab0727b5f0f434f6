"""Norms and SiLU-and-multiply on a real GPU: numbers, bits, rows that are strided, graphs, and early starts in chains.

Values that are whole numbers have squares whose sums are exact, so that bits must be those of torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from marlin import ops
from marlin.formats.layouts import PackedWeight, pack
from marlin.runtime import driver, rowwise
from marlin.testing import cases

_launch = importlib.import_module("marlin.runtime.launch")  # `marlin.runtime.launch` names the function

pytestmark = pytest.mark.gpu

DEVICE, EPS = "cuda", 1e-5
DTYPES = (torch.float16, torch.bfloat16)
ROWS, WIDTHS = (1, 7, 33, 1000), (576, 1536, 4096, 14336, 28672)
REPETITIONS = 200
_GUARD = 64
_SENTINEL = 1234.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)


def _whole(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator, device=DEVICE).to(dtype)


def _assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Two roundings to the type, and fp32 in between; wanted: float64."""
    u, least = (2.0**-11, 2.0**-24) if found.dtype == torch.float16 else (2.0**-8, 2.0**-133)
    bound = (2 * u + u * u + 2.0**-18) * wanted.abs() + 16 * least
    worst = ((found.double() - wanted).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


def _norm_steps(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The roundings of the kernel, by torch."""
    wide = z.float()
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / z.shape[-1] + EPS)
    return (wide * scale).to(z.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_within_two_roundings_of_float64(width: int, dtype: torch.dtype) -> None:
    weight = _random(width, dtype=dtype, seed=3)
    for rows in ROWS:
        x, residual = (_random(rows, width, dtype=dtype, seed=seed, scale=3.0) for seed in (1, 2))
        out, total = ops.fused_add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, x + residual)
        for found, z in ((out, total), (ops.rms_norm(x, weight, EPS), x)):
            wide = z.double()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
            _assert_close(found, wide * scale * weight.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_have_the_bits_of_torch_where_sums_are_exact(width: int, dtype: torch.dtype) -> None:
    weight = _random(width, dtype=dtype, seed=3)
    for rows in ROWS:
        x, residual = (_whole(rows, width, dtype=dtype, seed=seed) for seed in (1, 2))
        out, total = ops.fused_add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, x + residual) and torch.equal(out, _norm_steps(total, weight))
        assert torch.equal(ops.rms_norm(x, weight, EPS), _norm_steps(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_has_the_bits_of_torch(width: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x = _random(rows, 2 * width, dtype=dtype, scale=4.0)
        gate, up = x.chunk(2, dim=-1)
        found = ops.silu_and_mul(x)
        assert torch.equal(found, F.silu(gate) * up)
        wide = gate.double()
        _assert_close(found, wide * torch.sigmoid(wide) * up.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_values_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype) -> None:
    x, weight = _random(5, 4096, dtype=dtype), _random(4096, dtype=dtype)
    rows, clean = [0, 2, 4], ops.rms_norm(x, weight, EPS)
    silu = ops.silu_and_mul(x)
    x[1, 77], x[3, 4000] = torch.nan, torch.inf
    assert torch.equal(ops.rms_norm(x, weight, EPS)[rows], clean[rows])
    assert torch.equal(ops.silu_and_mul(x)[rows], silu[rows])
    assert bool(ops.rms_norm(x, weight, EPS)[1].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_silu_of_large_values_is_the_value_or_zero(dtype: torch.dtype) -> None:
    gate = torch.tensor([60000.0, -60000.0, 100.0, -100.0, 0.0, -0.0, 1.0, -1.0], device=DEVICE).to(dtype)
    found = ops.silu_and_mul(torch.cat((gate, torch.ones_like(gate))))
    assert torch.equal(found, F.silu(gate))


def test_rows_of_wider_tensors_and_odd_addresses_give_the_same() -> None:
    wide, weight = _random(33, 6144, dtype=torch.float16), _random(4096, dtype=torch.float16)
    odd_weight = torch.empty(4097, dtype=torch.float16, device=DEVICE)[1:].copy_(weight)
    for x in (wide[:, :4096], wide[:, 1024:5120], wide[:, 4:4100], wide[::2, :4096], wide.t()[:4096, :].t()):
        plain = x.contiguous()
        residual = wide[: x.shape[0], 2048:]
        assert torch.equal(ops.rms_norm(x, odd_weight, EPS), ops.rms_norm(plain, weight, EPS))
        found, wanted = (ops.fused_add_rms_norm(x, r, weight, EPS) for r in (residual, residual.contiguous()))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert torch.equal(ops.silu_and_mul(x), ops.silu_and_mul(plain))
    assert torch.equal(ops.rms_norm(wide.view(3, 11, 6144)[..., :4096], weight, EPS).view(33, 4096),
                       ops.rms_norm(wide[:, :4096], weight, EPS))  # fmt: skip
    assert ops.rms_norm(wide[:0, :4096], weight, EPS).shape == (0, 4096)


def test_bits_of_a_row_depend_on_that_row_alone() -> None:
    x, weight = _random(300, 5120, dtype=torch.bfloat16), _random(5120, dtype=torch.bfloat16)
    residual = _random(300, 5120, dtype=torch.bfloat16, seed=5)
    many, sums = ops.fused_add_rms_norm(x, residual, weight, EPS)
    for row in (0, 1, 150, 299):
        one, own = ops.fused_add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)
        assert torch.equal(one[0], many[row]) and torch.equal(own[0], sums[row])


def test_nothing_is_written_outside_of_the_outputs() -> None:
    device = driver.device_info(torch.cuda.current_device())
    for dtype in DTYPES:
        for op in rowwise.OPS:
            for rows, width in ((1, 8), (3, 264), (33, 4104), (2, 32768), (1000, 14336)):
                for early in (True, False):
                    plan = rowwise.make_rowwise_plan(op, rows, width, _name(dtype), device, early=early)
                    x = _random(rows, 2 * width, dtype=dtype)
                    buffers = [torch.full((rows * width + 2 * _GUARD,), _SENTINEL, dtype=dtype, device=DEVICE)
                               for _ in range(2)]  # fmt: skip
                    outs = [buffer[_GUARD:-_GUARD].fill_(torch.nan) for buffer in buffers]
                    _launch(plan, x, 2 * width, x, 2 * width, x[0], outs[0], outs[1])
                    count = 2 if op == "fused_add_rms_norm" else 1
                    for buffer, out in list(zip(buffers, outs, strict=True))[:count]:
                        edges = torch.cat((buffer[:_GUARD], buffer[-_GUARD:]))
                        assert bool((edges == _SENTINEL).all()) and not bool(out.isnan().any()), (op, rows, width)


def _launch(
    plan: rowwise.RowwisePlan,
    x: torch.Tensor,
    stride: int,
    residual: torch.Tensor,
    residual_stride: int,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
) -> None:
    kernel = rowwise.rowwise_kernel(plan.variant, torch.cuda.current_device())
    stream = torch.cuda.current_stream().cuda_stream
    if plan.variant.kind == "silu_and_mul":
        plan.silu_and_mul(kernel, x.data_ptr(), out.data_ptr(), stride, stream)
        return
    added = plan.variant.kind == "fused_add_rms_norm"
    sides = (residual.data_ptr(), total.data_ptr()) if added else (0, 0)
    pointers = (x.data_ptr(), sides[0], weight.data_ptr(), out.data_ptr(), sides[1])
    plan.norm(kernel, pointers, (stride, residual_stride if added else 0), EPS, stream)


def test_operators_are_captured_and_replayed_with_new_inputs() -> None:
    x, residual = _random(16, 4096, dtype=torch.float16), _random(16, 4096, dtype=torch.float16, seed=1)
    weight = _random(4096, dtype=torch.float16, seed=2)

    def steps() -> tuple[torch.Tensor, ...]:
        out, total = ops.fused_add_rms_norm(x, residual, weight, EPS)
        return out, total, ops.silu_and_mul(out), ops.rms_norm(total, weight, EPS)

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for seed in range(3, 8):
        x.copy_(_random(16, 4096, dtype=torch.float16, seed=seed))
        graph.replay()
        assert all(torch.equal(found, wanted) for found, wanted in zip(captured, steps(), strict=True))


@pytest.mark.parametrize("op", rowwise.OPS)
def test_compiled_calls_give_what_eager_ones_give(op: str) -> None:
    x, weight = _random(16, 4096, dtype=torch.float16), _random(4096, dtype=torch.float16)
    args: tuple[Any, ...] = {"rms_norm": (x, weight, EPS), "silu_and_mul": (x,)}.get(op, (x, x + 1, weight, EPS))
    function = getattr(ops, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args), rtol=0, atol=0)
    assert torch.library.opcheck(getattr(torch.ops.marlin, op), args)


class Chain:
    """Products with an added norm and SiLU between them, as a decoder layer has them, into outputs of its own."""

    def __init__(self, m: int, dtype: torch.dtype) -> None:
        hidden, inner = 1024, 3072
        shapes = ((hidden, hidden), (2 * inner, hidden), (hidden, inner))
        self.weights: list[PackedWeight] = [
            pack(cases.random_weight(n, k, 128, "w4a16_sp24", dtype=dtype, device=DEVICE, seed=n)) for n, k in shapes
        ]
        self.norm = _random(hidden, dtype=dtype, seed=9)
        self.x, self.residual = (_random(m, hidden, dtype=dtype, seed=seed) for seed in (7, 8))
        sizes = (hidden, hidden, hidden, 2 * inner, inner, hidden)
        self.outs = [torch.empty(m, size, dtype=dtype, device=DEVICE) for size in sizes]
        self.plans = [
            (op, m, width, _name(dtype)) for op, width in (("fused_add_rms_norm", hidden), ("silu_and_mul", inner))
        ]

    def run(self, early: bool, between: Callable[[torch.Tensor], Any] = lambda out: None) -> None:
        first, normed, total, gates, active, last = self.outs
        device = driver.device_info(torch.cuda.current_device())
        norm, silu = (rowwise.make_rowwise_plan(*plan, device, early=early) for plan in self.plans)
        ops.linear_out(self.x, self.weights[0], first)
        between(first)
        hidden = first.shape[1]
        _launch(norm, first, hidden, self.residual, hidden, self.norm, normed, total)
        between(normed)
        ops.linear_out(normed, self.weights[1], gates)
        _launch(silu, gates, gates.shape[1], gates, 0, gates, active, active)
        between(active)
        ops.linear_out(active, self.weights[2], last)
        between(last)

    def poison(self) -> None:
        for out in self.outs:
            out.fill_(torch.nan)


@pytest.fixture
def without_early_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    def switch(early: bool) -> None:
        monkeypatch.setattr(_launch, "PDL", early)

    yield switch


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_chain_of_early_starts_keeps_its_bits(m: int, graph: bool, without_early_starts: Callable[[bool], None]):
    chain = Chain(m, torch.float16)
    without_early_starts(False)
    chain.poison()
    chain.run(early=False)
    wanted = [out.clone() for out in chain.outs]
    assert not any(bool(out.isnan().any()) for out in wanted)
    without_early_starts(True)
    step: Callable[[], None] = lambda: chain.run(early=True)  # noqa: E731
    step()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(4):
                step()
        step = captured.replay
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPETITIONS):
        chain.poison()
        step()
        for out, right in zip(chain.outs, wanted, strict=True):
            wrong += (out != right).sum()
    assert wrong.item() == 0


def test_kernels_of_others_in_between_see_finished_outputs() -> None:
    chain, copies = Chain(16, torch.bfloat16), []
    chain.run(early=True)
    wanted = [chain.outs[index].clone() for index in (0, 1, 4, 5)]
    for _ in range(REPETITIONS):
        chain.poison()
        chain.run(early=True, between=lambda out: copies.append(out.clone()))
        assert len(copies) == len(wanted)
        assert all(torch.equal(copy, right) for copy, right in zip(copies, wanted, strict=True))
        copies.clear()
