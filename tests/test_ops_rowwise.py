"""The operators between products: values on the CPU, what they refuse, tracing, and what the CUDA path hands on."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from marlin import ops
from marlin.ops import rowwise

DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-5


def _random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm64(z: Tensor, weight: Tensor) -> Tensor:
    wide = z.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (3, 264), (2, 5, 1024), (0, 64)], ids=str)
def test_operators_on_the_cpu_are_within_two_roundings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = (
        _random(*shape, dtype=dtype),
        _random(*shape, dtype=dtype, seed=1),
        _random(shape[-1], dtype=dtype),
    )
    u = 2.0**-11 if dtype == torch.float16 else 2.0**-8

    def close(found: Tensor, wanted: Tensor) -> bool:
        return bool(((found.double() - wanted).abs() <= 2.01 * u * wanted.abs() + 2.0**-22).all())

    out, total = ops.fused_add_rms_norm(x, residual, weight, EPS)
    assert out.dtype == total.dtype == dtype and torch.equal(total, x + residual)
    assert close(out, _norm64(total, weight)) and close(ops.rms_norm(x, weight, EPS), _norm64(x, weight))
    both = torch.cat((x, residual), dim=-1)
    assert ops.silu_and_mul(both).shape == x.shape
    assert close(ops.silu_and_mul(both), x.double() * torch.sigmoid(x.double()) * residual.double())


def test_float32_serves_as_a_reference_on_the_cpu() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), F.rms_norm(x, (64,), weight, EPS))
    assert ops.fused_add_rms_norm(x, x, weight, EPS)[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x, w: ops.rms_norm(x[:, :60], w, EPS),
            ValueError,
            "rms_norm: x must end in a positive multiple of 8; got shape (3, 60).",
        ),
        (
            lambda x, w: ops.silu_and_mul(x[:, :56]),
            ValueError,
            "silu_and_mul: x must end in a positive multiple of 16; got shape (3, 56).",
        ),
        (
            lambda x, w: ops.rms_norm(x, w[:56], EPS),
            ValueError,
            "rms_norm: weight must have shape (64,); got (56,).",
        ),
        (
            lambda x, w: ops.fused_add_rms_norm(x, x[:2], w, EPS),
            ValueError,
            "fused_add_rms_norm: residual must have shape (3, 64); got (2, 64).",
        ),
        (
            lambda x, w: ops.fused_add_rms_norm(x, x.bfloat16(), w, EPS),
            TypeError,
            "fused_add_rms_norm: x and residual must have the same dtype; got x torch.float16, "
            "residual torch.bfloat16. Cast one of them.",
        ),
        (
            lambda x, w: ops.silu_and_mul(x.double()),
            TypeError,
            "silu_and_mul: x must be torch.float16 or torch.bfloat16 or torch.float32; got torch.float64. "
            "Cast it with .to(dtype).",
        ),
        (
            lambda x, w: ops.rms_norm(x[0, 0], w, EPS),
            ValueError,
            "rms_norm: x must have at least 1 dimension; got a scalar.",
        ),
        (
            lambda x, w: ops.rms_norm(torch.zeros(1, 32776).half(), torch.zeros(32776).half(), EPS),
            ValueError,
            "rms_norm: a row must have at most 32768 values; got 32776.",
        ),
        (
            lambda x, w: ops.rms_norm(x, w.to("meta"), EPS),
            ValueError,
            "rms_norm: all tensors must be on one device; got x on cpu, weight on meta. Move one of them.",
        ),
    ],
    ids=["width", "halves", "weight", "residual", "dtype", "double", "scalar", "wide", "device"],
)
def test_what_cannot_be_computed_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        call(_random(3, 64), _random(64))
    assert str(raised.value) == text


def _cases() -> dict[str, tuple[Any, ...]]:
    x, weight = _random(4, 64), _random(64)
    return {"rms_norm": (x, weight, EPS), "fused_add_rms_norm": (x, x + 1, weight, EPS), "silu_and_mul": (x,)}


@pytest.mark.parametrize("op", list(_cases()))
def test_operators_are_traced_and_leave_their_arguments(op: str) -> None:
    args = _cases()[op]
    before = [arg.clone() for arg in args if isinstance(arg, Tensor)]
    function, wanted = getattr(ops, op), getattr(ops, op)(*args)
    torch.library.opcheck(getattr(torch.ops.marlin, op), args)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*args), wanted, rtol=0, atol=0)
    assert all(
        torch.equal(arg, old) for arg, old in zip((a for a in args if isinstance(a, Tensor)), before, strict=True)
    )


def test_a_gradient_that_is_wanted_goes_through_torch_which_has_none() -> None:
    x = _random(4, 64).requires_grad_()
    out = ops.silu_and_mul(x)
    assert torch.equal(out, ops.silu_and_mul(x.detach()))


class FakePlan:
    """Stands for a plan and its kernel: reads what the pointers point at, and computes on the CPU."""

    def __init__(self, op: str, rows: int, width: int, dtype: str) -> None:
        self.op, self.rows, self.width, self.dtype = op, rows, width, getattr(torch, dtype)
        self.variant = op

    def _read(self, address: int, width: int, stride: int) -> Tensor:
        assert address % 16 == 0
        size = ((self.rows - 1) * stride + width) * 2
        values = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=self.dtype)
        return values.as_strided((self.rows, width), (stride, 1))

    def norm(self, kernel: Any, pointers: tuple[int, ...], strides: tuple[int, int], eps: float, stream: int) -> None:
        assert kernel == "kernel" and stream == 5
        x, residual, weight, out, total = pointers
        args = [self._read(x, self.width, strides[0])]
        if self.op == "fused_add_rms_norm":
            args.append(self._read(residual, self.width, strides[1]))
        else:
            assert residual == total == 0
        gain = self._read(weight, self.width, 0)[0]
        found = rowwise._OPERATORS[self.op].cpu(*args, gain, eps)
        outs = [address for address in (out, total) if address]
        for address, values in zip(outs, found if isinstance(found, tuple) else (found,), strict=True):
            self._read(address, self.width, self.width).copy_(values)

    def silu_and_mul(self, kernel: Any, x: int, out: int, stride: int, stream: int) -> None:
        assert kernel == "kernel" and stream == 5
        self._read(out, self.width, self.width).copy_(rowwise._silu_cpu(self._read(x, 2 * self.width, stride)))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[FakePlan]:
    """The CUDA path on tensors of the CPU; the plans that were made."""
    from marlin.runtime import rowwise as runtime

    made: list[FakePlan] = []

    def plan(op: str, rows: int, width: int, dtype: str, index: int) -> FakePlan:
        made.append(FakePlan(op, rows, width, dtype))
        return made[-1]

    monkeypatch.setattr(runtime, "rowwise_plan", plan)
    monkeypatch.setattr(runtime, "rowwise_kernel", lambda variant, index: "kernel")
    monkeypatch.setattr(rowwise, "raw_stream", lambda index: 5)
    monkeypatch.setattr(rowwise, "current_device", lambda: -1)
    monkeypatch.setattr(
        rowwise, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    monkeypatch.setattr(rowwise, "_calls", {})
    return made


def test_pointers_and_strides_are_those_of_the_rows(plans: list[FakePlan]) -> None:
    wide, gain = _random(6, 192), _random(72)[:64]
    odd = torch.empty(65, dtype=torch.float16)[1:].copy_(gain)
    for x in (
        wide[:, :64],
        wide[:, 64:128],
        wide[:, 4:68],
        wide[::2, 8:72],
        wide.view(2, 3, 192)[..., :64],
        wide[0, :64],
    ):
        plain, residual = x.contiguous(), (x + 1)
        for weight in (gain, odd):
            assert torch.equal(rowwise._rms_norm_cuda(x, weight, EPS), rowwise._norm_cpu(plain, gain, EPS))
        found = rowwise._add_norm_cuda(residual, x, gain, EPS)
        wanted = rowwise._add_norm_cpu(residual, plain, gain, EPS)
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
        assert torch.equal(rowwise._silu_cuda(x), rowwise._silu_cpu(plain))
        assert found[0].shape == x.shape and found[0].is_contiguous()


def test_calls_are_planned_once_for_a_signature_and_none_for_no_rows(plans: list[FakePlan]) -> None:
    x, gain = _random(4, 64), _random(64)
    for _ in range(3):
        rowwise._rms_norm_cuda(x, gain, EPS)
    assert [(plan.op, plan.rows, plan.width) for plan in plans] == [("rms_norm", 4, 64)]
    rowwise._rms_norm_cuda(x[:2], gain, EPS)
    rowwise._silu_cuda(x)
    assert [(plan.op, plan.rows, plan.width) for plan in plans[1:]] == [("rms_norm", 2, 64), ("silu_and_mul", 4, 32)]
    assert rowwise._add_norm_cuda(x[:0], x[:0], gain, EPS)[0].shape == (0, 64) and rowwise._silu_cuda(x[:0]).shape == (
        0,
        32,
    )
    assert len(plans) == 3


def test_cuda_path_refuses_what_the_cpu_does(plans: list[FakePlan]) -> None:
    x, gain = _random(4, 64), _random(64)
    rowwise._rms_norm_cuda(x, gain, EPS)
    with pytest.raises(ValueError, match="weight must have shape"):
        rowwise._rms_norm_cuda(x, _random(56), EPS)
    with pytest.raises(TypeError, match="x and weight must have the same dtype"):
        rowwise._rms_norm_cuda(x, gain.bfloat16(), EPS)
    with pytest.raises(ValueError, match="residual must have shape"):
        rowwise._add_norm_cuda(x, x[:3], gain, EPS)
