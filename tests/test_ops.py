"""The operators on the CPU: values, shapes, refusals, gradients, tracing, and the fp32 weights that the CPU keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from marlin import ops, settings
from marlin.formats import CompressedWeight, DenseInt4Weight, group_scales, quantize, top2_mask
from marlin.formats.layouts import PackedWeight, pack, unpack

KINDS = ("w4a16_sp24", "w4a16_dense")


def make_packed(
    kind: str, n: int = 72, k: int = 96, group_size: int = 32, dtype: torch.dtype = torch.float16
) -> PackedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    mask = top2_mask(weight.abs()) if kind == "w4a16_sp24" else None
    scales = group_scales(weight, group_size, mask).to(dtype)
    codes = quantize(weight, scales)
    if mask is None:
        return pack(DenseInt4Weight(codes, scales, group_size))
    return pack(CompressedWeight.from_codes(codes, mask, scales, group_size))


def dense64(packed: PackedWeight) -> torch.Tensor:
    return unpack(packed).to_dense(torch.float32).double()


def arguments(packed: PackedWeight, act: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[object, ...]:
    tensors = [t for t in (packed.codes, packed.meta, packed.scales) if t is not None]
    return (act, *tensors, bias, packed.n, packed.group_size)


def operator(kind: str, suffix: str = "") -> torch._ops.OpOverload:
    return getattr(torch.ops.marlin, kind + suffix).default


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    ops.clear_cpu_cache()


CASES = [  # kind, n, k, group_size, dtype: one reason each
    pytest.param("w4a16_sp24", 8, 32, 32, torch.float16, id="sp24-smallest"),
    pytest.param("w4a16_sp24", 72, 96, 32, torch.bfloat16, id="sp24-padded-both-ways"),
    pytest.param("w4a16_sp24", 128, 256, 128, torch.float16, id="sp24-whole-tiles"),
    pytest.param("w4a16_sp24", 64, 160, -1, torch.bfloat16, id="sp24-one-scale-per-row"),
    pytest.param("w4a16_sp24", 64, 128, 64, torch.float32, id="sp24-float32"),
    pytest.param("w4a16_dense", 8, 32, 32, torch.bfloat16, id="dense-smallest"),
    pytest.param("w4a16_dense", 72, 96, -1, torch.float16, id="dense-padded-both-ways"),
    pytest.param("w4a16_dense", 64, 128, 64, torch.float32, id="dense-float32"),
]


@pytest.mark.parametrize(("kind", "n", "k", "group_size", "dtype"), CASES)
def test_operator_gives_back_the_weight_for_one_hot_activations(kind, n, k, group_size, dtype):
    packed = make_packed(kind, n, k, group_size, dtype)
    out = operator(kind)(*arguments(packed, torch.eye(k, dtype=dtype)))
    assert out.dtype == dtype
    assert torch.equal(out.T, unpack(packed).to_dense(dtype))


@pytest.mark.parametrize("m", [1, 7, 65])
@pytest.mark.parametrize(("kind", "n", "k", "group_size", "dtype"), CASES)
def test_operator_rounds_the_exact_product_once(kind, n, k, group_size, dtype, m):
    packed = make_packed(kind, n, k, group_size, dtype)
    act, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    out = operator(kind)(*arguments(packed, act, bias))
    exact = act.double() @ dense64(packed).T + bias.double()
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]
    accumulation = k * 2.0**-24 * (act.double().abs() @ dense64(packed).abs().T + bias.double().abs())
    assert bool(((out.double() - exact).abs() <= unit * exact.abs() + accumulation + 2.0**-25).all())


@pytest.mark.parametrize("kind", KINDS)
def test_operator_adds_the_bias_before_rounding(kind):
    packed = make_packed(kind)
    bias = torch.full((packed.n,), 1000.0, dtype=torch.float16)
    out = operator(kind)(*arguments(packed, torch.eye(packed.k, dtype=torch.float16), bias))
    assert torch.equal(out.T, (unpack(packed).to_dense(torch.float32) + 1000.0).half())


@pytest.mark.parametrize("shape", [(96,), (0, 96), (3, 0, 96), (2, 3, 96)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_operator_keeps_leading_dimensions_also_when_empty(kind, shape):
    packed = make_packed(kind)
    act = torch.randn(shape).half()
    out = ops.linear(act, packed)
    assert out.shape == (*shape[:-1], 72)
    assert torch.equal(out.reshape(-1, 72), ops.linear(act.reshape(-1, 96), packed))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_takes_any_strides_of_act(kind):
    packed = make_packed(kind)
    act = torch.randn(5, 96).half()
    expected = ops.linear(act, packed)
    for strided in (act.T.contiguous().T, torch.cat([act, act], 1)[:, 96:], torch.cat([act[:, :1], act], 1)[:, 1:]):
        assert not strided.is_contiguous()
        assert torch.equal(ops.linear(strided, packed), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_computes_weights_cut_along_n_and_along_k(kind):
    packed = make_packed(kind, 192, 256, 64)
    act = torch.randn(3, 256).half()
    whole = act.double() @ dense64(packed).T
    rows = ops.linear(act.float(), packed.narrow_n(64, 128))
    assert torch.allclose(rows.double(), whole[:, 64:], atol=1e-4)
    halves = [ops.linear(act[:, s : s + 128].float(), packed.narrow_k(s, 128)) for s in (0, 128)]
    assert torch.allclose((halves[0] + halves[1]).double(), whole, atol=1e-4)


def test_operator_takes_float32_activations_with_16_bit_scales_on_the_cpu():
    packed = make_packed("w4a16_sp24")
    bias = torch.randn(72).half()
    out = ops.linear(torch.eye(96), packed, bias)
    assert out.dtype == torch.float32
    assert torch.equal(out.T, unpack(packed).to_dense(torch.float32) + bias.float()[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_out_operator_overwrites_a_poisoned_output(kind):
    packed = make_packed(kind)
    act, bias = torch.randn(2, 5, 96).half(), torch.randn(72).half()
    out = torch.full((10, 72), torch.nan, dtype=torch.float16)
    assert ops.linear_out(act, packed, out, bias) is out
    assert torch.equal(out, ops.linear(act, packed, bias).reshape(10, 72))


def _swap(name: str, value: object):
    names = ("act", "codes", "meta", "scales", "bias", "n", "group_size")

    def change(args: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(value(old) if key == name else old for key, old in zip(names, args, strict=True))

    return change


REFUSALS = [
    pytest.param(
        _swap("act", lambda t: t.double()),
        TypeError,
        "w4a16_sp24: act must be torch.float16 or torch.bfloat16 or torch.float32; got torch.float64. "
        "Cast it with .to(dtype).",
        id="act-dtype",
    ),
    pytest.param(
        _swap("act", lambda t: t.bfloat16()),
        TypeError,
        "w4a16_sp24: act and scales must have the same dtype; got act torch.bfloat16, scales torch.float16. "
        "Cast act, or the layer with .to(dtype).",
        id="act-and-scales",
    ),
    pytest.param(
        _swap("bias", lambda t: t.float()),
        TypeError,
        "w4a16_sp24: act and bias must have the same dtype; got act torch.float16, bias torch.float32. "
        "Cast act, or the layer with .to(dtype).",
        id="bias-dtype",
    ),
    pytest.param(
        _swap("act", lambda t: t[0, 0]),
        ValueError,
        "w4a16_sp24: act must have at least 1 dimension; got a scalar.",
        id="scalar",
    ),
    pytest.param(
        _swap("act", lambda t: t[:, :40]),
        ValueError,
        "w4a16_sp24: act must end in K, a positive multiple of 32; got shape (5, 40).",
        id="k",
    ),
    pytest.param(
        _swap("act", lambda t: t[:, :64]),
        ValueError,
        "w4a16_sp24: codes must have shape (2, 1, 256) for K=64, n=72, group_size=32; got (2, 2, 256). "
        "Check act's last dimension, and n and group_size of the packed weight.",
        id="other-k",
    ),
    pytest.param(
        _swap("n", lambda n: 100), ValueError, "w4a16_sp24: n must be a positive multiple of 8; got n=100.", id="n"
    ),
    pytest.param(
        _swap("n", lambda n: 136),
        ValueError,
        "w4a16_sp24: codes must have shape (3, 2, 256) for K=96, n=136, group_size=32; got (2, 2, 256). "
        "Check act's last dimension, and n and group_size of the packed weight.",
        id="other-n",
    ),
    pytest.param(
        _swap("group_size", lambda g: 48),
        ValueError,
        "w4a16_sp24: group_size must be one of (32, 64, 128, -1); got group_size=48.",
        id="group-size",
    ),
    pytest.param(
        _swap("group_size", lambda g: 64),
        ValueError,
        "w4a16_sp24: K must be a multiple of group_size=64; got K=96. Use a smaller group_size, or -1 for one scale "
        "per row.",
        id="group-size-and-k",
    ),
    pytest.param(
        _swap("group_size", lambda g: -1),
        ValueError,
        "w4a16_sp24: scales must have shape (2, 1, 64) for K=96, n=72, group_size=-1; got (2, 3, 64). "
        "Check act's last dimension, and n and group_size of the packed weight.",
        id="scales-shape",
    ),
    pytest.param(
        _swap("meta", lambda t: t[..., :64]),
        ValueError,
        "w4a16_sp24: meta must have shape (2, 2, 128) for K=96, n=72, group_size=32; got (2, 2, 64). "
        "Check act's last dimension, and n and group_size of the packed weight.",
        id="meta-shape",
    ),
    pytest.param(
        _swap("codes", lambda t: t.long()),
        TypeError,
        "w4a16_sp24: codes must be int32; got torch.int64. Pack with marlin.formats.layouts.pack.",
        id="codes-dtype",
    ),
    pytest.param(
        _swap("bias", lambda t: t[:64]),
        ValueError,
        "w4a16_sp24: bias must have shape (72,) for K=96, n=72, group_size=32; got (64,). "
        "Check act's last dimension, and n and group_size of the packed weight.",
        id="bias-shape",
    ),
    pytest.param(
        _swap("meta", lambda t: torch.zeros_like(t)),
        ValueError,
        "CompressedWeight: positions must be legal 2:4 nibbles (4, 8, 9, 12, 13, 14); got values [0].",
        id="illegal-metadata",
    ),
    pytest.param(
        _swap("scales", lambda t: t * torch.inf),
        ValueError,
        "CompressedWeight: scales must be finite; got NaN or infinity. Recompute them.",
        id="infinite-scales",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSALS)
def test_operator_refuses(change, error, text):
    args = arguments(make_packed("w4a16_sp24"), torch.randn(5, 96).half(), torch.zeros(72).half())
    with pytest.raises(error) as caught:
        operator("w4a16_sp24")(*change(args))
    assert str(caught.value) == text


def test_operator_refuses_tensors_on_two_devices():
    packed = make_packed("w4a16_dense")
    with pytest.raises(ValueError) as caught:
        operator("w4a16_dense")(torch.randn(5, 96).half(), packed.codes, packed.scales.to("meta"), None, 72, 32)
    assert str(caught.value) == (
        "w4a16_dense: all tensors must be on one device; got act on cpu, codes on cpu, scales on meta. "
        "Move the input or the layer."
    )


OUT_REFUSALS = [
    pytest.param(
        torch.empty(5, 64).half(),
        "(5, 64) with strides (64, 1), torch.float16 on cpu",
        id="shape",
    ),
    pytest.param(torch.empty(5, 72), "(5, 72) with strides (72, 1), torch.float32 on cpu", id="dtype"),
    pytest.param(torch.empty(72, 5).half().T, "(5, 72) with strides (1, 5), torch.float16 on cpu", id="strides"),
]


@pytest.mark.parametrize(("out", "got"), OUT_REFUSALS)
def test_out_operator_refuses_an_output_that_does_not_fit(out, got):
    with pytest.raises(ValueError) as caught:
        ops.linear_out(torch.randn(5, 96).half(), make_packed("w4a16_sp24"), out)
    expected = f"w4a16_sp24: out must be contiguous, [M, N] = [5, 72], torch.float16 on cpu; got {got}."
    assert str(caught.value) == expected


def test_out_operator_refuses_to_lose_a_gradient():
    act = torch.randn(5, 96).half().requires_grad_()
    with pytest.raises(RuntimeError) as caught:
        ops.linear_out(act, make_packed("w4a16_sp24"), torch.empty(5, 72).half())
    assert str(caught.value) == (
        "w4a16_sp24: writing into out must not need gradients; got act with requires_grad. "
        "Use w4a16_sp24 without _out, or torch.no_grad()."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_act_and_bias_and_nothing_else(kind):
    packed = make_packed(kind, dtype=torch.float32)
    act, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(72, requires_grad=True)
    scales = packed.scales.clone().requires_grad_()
    grad = torch.randn(2, 3, 72)
    tensors = [t for t in (packed.codes, packed.meta) if t is not None]
    operator(kind)(act, *tensors, scales, bias, 72, 32).backward(grad)
    assert torch.allclose(act.grad.double(), grad.double() @ dense64(packed), atol=1e-4)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)
    assert scales.grad is None


def test_gradients_are_rounded_once_in_16_bit():
    packed = make_packed("w4a16_sp24")
    act = torch.randn(4, 96).half().requires_grad_()
    grad = torch.eye(4, 72).half()
    ops.linear(act, packed).backward(grad)
    assert torch.equal(act.grad, unpack(packed).to_dense(torch.float16)[:4])


def test_gradients_do_not_depend_on_inference_mode_before():
    packed = make_packed("w4a16_sp24")
    with torch.inference_mode():
        ops.linear(torch.randn(1, 96).half(), packed)
    act = torch.randn(1, 96).half().requires_grad_()
    ops.linear(act, packed).sum().backward()
    assert act.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_operator_gives_the_same_in_every_grad_mode(mode):
    packed = make_packed("w4a16_sp24")
    act = torch.randn(3, 96).half()
    expected = operator("w4a16_sp24")(*arguments(packed, act))
    with mode():
        assert torch.equal(ops.linear(act, packed), expected)


@pytest.mark.parametrize("with_bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_operator_passes_opcheck(kind, with_bias):
    packed = make_packed(kind)
    bias = torch.randn(72).half().requires_grad_() if with_bias else None
    torch.library.opcheck(operator(kind), arguments(packed, torch.randn(5, 96).half().requires_grad_(), bias))
    plain = None if bias is None else bias.detach()
    args = (*arguments(packed, torch.randn(5, 96).half(), plain), torch.empty(5, 72).half())
    torch.library.opcheck(operator(kind, "_out"), args)


def test_dequantize_passes_opcheck_and_gives_the_weight():
    packed = make_packed("w4a16_sp24")
    args = (packed.codes, packed.meta, packed.scales, 72, 96, 32, torch.float32)
    torch.library.opcheck(torch.ops.marlin.dequantize.default, args)
    assert torch.equal(torch.ops.marlin.dequantize(*args), unpack(packed).to_dense(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_compiles_whole_with_dynamic_m(kind):
    packed = make_packed(kind)
    compiled = torch.compile(
        lambda act: ops.linear(act * 2, packed).relu(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m in (2, 5, 9):
        act = torch.randn(m, 96).half().requires_grad_(m == 9)
        out = compiled(act)
        assert torch.equal(out, ops.linear(act * 2, packed).relu())
    out.sum().backward()
    assert act.grad is not None


def test_out_operator_compiles_whole():
    packed = make_packed("w4a16_sp24")

    def run(act: torch.Tensor) -> torch.Tensor:
        out = torch.empty(act.shape[0], 72, dtype=act.dtype)
        return ops.linear_out(act, packed, out) + 1

    act = torch.randn(4, 96).half()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(act), run(act))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_infers_shapes_on_meta(kind):
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(make_packed(kind), torch.ones(4, 96))]
    out = operator(kind)(*args)
    assert (out.shape, out.dtype, out.device.type) == ((4, 72), torch.float32, "meta")


def test_describe_names_the_cpu_path_and_refuses_what_has_none():
    assert ops.describe("w4a16_sp24", 1, 64, 64, 64, torch.float16, "cpu") == "cpu reference (fp32)"
    with pytest.raises(ValueError) as caught:
        ops.describe("w8", 1, 64, 64, 64, torch.float16, "cpu")
    assert str(caught.value) == "describe: kind must be one of ('w4a16_sp24', 'w4a16_dense'); got 'w8'."
    with pytest.raises(ValueError) as caught:
        ops.describe("w4a16_sp24", 1, 64, 64, 64, torch.float32, "cuda")
    assert str(caught.value) == "describe: kernels run fp16 or bf16 on CUDA; got torch.float32 on cuda."


def test_import_registers_the_operators_and_starts_nothing():
    program = (
        "import sys, marlin, torch; torch.ops.marlin.w4a16_sp24.default, torch.ops.marlin.w4a16_dense_out.default; "
        "loaded = {'transformers', 'marlin.runtime', 'marlin.compress', 'typer'} & set(sys.modules); "
        "assert not loaded, loaded; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batch_invariant_mode_gives_rows_the_same_bits_whatever_the_others(monkeypatch, dtype):
    monkeypatch.setattr(settings, "_batch_invariant", True)
    packed = make_packed("w4a16_sp24", 200, 576, 64)
    act = torch.randn(33, 576).to(dtype)
    bias = torch.randn(200).to(dtype)
    expected = ops.linear(act, packed, bias)
    assert torch.allclose(expected.double(), act.double() @ dense64(packed).T + bias.double(), rtol=2e-3, atol=2e-3)
    for m in (1, 2, 16, 33):
        assert torch.equal(ops.linear(act[:m], packed, bias), expected[:m])
        rows = torch.randperm(33)[:m]
        assert torch.equal(ops.linear(act[rows], packed, bias), expected[rows])
    assert ops.linear(act[:0], packed).shape == (0, 200)
    assert torch.equal(ops.linear(act.view(3, 11, 576), packed, bias).view(33, 200), expected)
    shifted = torch.cat([act[0, :1], act.flatten()])[1:].view_as(act)
    assert torch.equal(ops.linear(shifted, packed, bias), expected)
