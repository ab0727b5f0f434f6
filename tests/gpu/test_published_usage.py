"""The published packages' way of use on the GPU: their shapes, thread shapes and measure, and the elementwise bound.

Inputs are built as users of those packages build them: a random weight, one scale per group from its largest value,
codes stored with offset 8, a layer of a small legal size whose attributes and buffers are then set by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import marlin
from marlin._semi_structured_conversions import mask_creator
from marlin.formats import CompressedWeight, DenseInt4Weight
from marlin.testing import tolerance

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
THREAD_SHAPES = [(64, 256), (128, 128)]


def quantized(k: int, n: int, groupsize: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored codes (k, n) in 0..15, scales fp16 (groups, n), and the weight fp16 (k, n) that they stand for."""
    length = k if groupsize == -1 else groupsize
    groups = torch.randn(k // length, length, n, dtype=torch.half, device=DEVICE)
    scales = groups.abs().amax(1, keepdim=True) * (2 / 15)
    codes = ((groups / scales).round().int() + 8).clamp(0, 15)
    weight = (codes - 8).half() * scales
    return codes.reshape(k, n), scales.reshape(-1, n), weight.reshape(k, n)


def prepared(layer: nn.Module, k: int, n: int, groupsize: int, **shapes: tuple[int, int]) -> nn.Module:
    layer.k, layer.n, layer.groupsize = k, n, k if groupsize == -1 else groupsize
    layer.s = torch.empty((k // layer.groupsize, n), dtype=torch.half, device=DEVICE)
    for name, shape in shapes.items():
        dtype = torch.int16 if name == "meta" else torch.int
        setattr(layer, name, torch.empty(shape, dtype=dtype, device=DEVICE))
    return layer


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(16, 16)
    linear.weight.data = weight
    return linear


def mean_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).abs().mean() / reference.abs().mean())


def run_sparse(tokens: int, n: int, k: int, threads: tuple[int, int] = (-1, -1), groupsize: int = -1) -> None:
    codes, scales, weight = quantized(k, n, groupsize)
    mask = mask_creator(codes.T).cuda().bool()
    layer = prepared(
        marlin.Layer_2_4(256, 256, groupsize=groupsize), k, n, groupsize, B=(k // 32, 2 * n), meta=(n, k // 16)
    )
    layer.pack(linear_of(weight), scales, True)
    act = torch.randn(tokens, k, dtype=torch.half, device=DEVICE)
    out = torch.full((tokens, n), torch.nan, dtype=torch.half, device=DEVICE)
    workspace = torch.zeros(n // 128 * 16, dtype=torch.int32, device=DEVICE)
    marlin.mul_2_4(act, layer.B, layer.meta, out, layer.s, workspace, *threads, -1)
    torch.cuda.synchronize()
    assert mean_error(out, act @ (mask * weight.T).T) < 0.002
    exact = CompressedWeight.from_codes((codes.T - 8).to(torch.int8), mask, scales.T.contiguous(), groupsize)
    tolerance.check(out, act, exact)
    assert torch.equal(layer(act), out)


def run_dense(tokens: int, n: int, k: int, threads: tuple[int, int] = (-1, -1), groupsize: int = -1) -> None:
    codes, scales, weight = quantized(k, n, groupsize)
    layer = prepared(marlin.Layer(256, 256, groupsize=groupsize), k, n, groupsize, B=(k // 16, 2 * n))
    layer.pack(linear_of(weight.t()), scales.t())
    act = torch.randn(tokens, k, dtype=torch.half, device=DEVICE)
    out = torch.full((tokens, n), torch.nan, dtype=torch.half, device=DEVICE)
    marlin.mul(act, layer.B, out, layer.s, torch.zeros(n // 128 * 16, device=DEVICE), *threads, -1)
    torch.cuda.synchronize()
    assert mean_error(out, act @ weight) < 0.001
    exact = DenseInt4Weight((codes.T - 8).to(torch.int8).contiguous(), scales.T.contiguous(), groupsize)
    tolerance.check(out, act, exact)
    assert torch.equal(layer(act), out)


RUN = {"sparse": run_sparse, "dense": run_dense}
both = pytest.mark.parametrize("kind", RUN)


@both
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152, 768, 1024])
@pytest.mark.parametrize("threads", THREAD_SHAPES, ids=str)
def test_every_batch_size_with_every_thread_shape(kind, tokens, threads):
    RUN[kind](tokens, 512, 1024, threads)


@both
@pytest.mark.parametrize("k", [64, 128, 192, 768, 832, 896])
def test_few_and_odd_numbers_of_stages(kind, k):
    RUN[kind](16, 768, k, (64, 256))


@both
@pytest.mark.parametrize("threads", THREAD_SHAPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(256, 512), (256, 1024), (256 * 128, 1024)])
def test_groups_of_128(kind, n, k, threads):
    RUN[kind](16, n, k, threads, 128)


def test_shapes_of_the_published_correctness_test():
    run_sparse(16, 256, 256, (128, 128))
    run_sparse(16, 21504, 4096, (64, 256), 128)


@both
def test_shapes_of_language_models(kind):
    for k, n in [(4096, 12288), (4096, 4096), (4096, 21504), (10752, 4096)]:
        RUN[kind](16, n, k, (128, 128))


def test_thread_shapes_and_scales_that_do_not_fit_are_refused():
    _, scales, weight = quantized(64, 256, -1)
    layer = prepared(marlin.Layer(256, 256), 64, 256, -1, B=(4, 512))
    layer.pack(linear_of(weight.t()), scales.t())
    act = torch.randn(16, 64, dtype=torch.half, device=DEVICE)
    out, workspace = torch.zeros(16, 256, dtype=torch.half, device=DEVICE), torch.zeros(2, device=DEVICE)
    for threads in [(128, 128), (256, 256)]:
        with pytest.raises(ValueError, match="the thread shape must"):
            marlin.mul(act, layer.B, out, layer.s, workspace, *threads, -1)
    three = torch.zeros(3, 256, dtype=torch.half, device=DEVICE)
    with pytest.raises(ValueError, match="s must have k / groupsize rows"):
        marlin.mul(act, layer.B, out, three, workspace)
    assert not out.any()


def test_layers_run_inside_a_compiled_model():
    _, scales, weight = quantized(256, 512, 128)
    layer = marlin.Layer_2_4(256, 512, groupsize=128).to(DEVICE)
    layer.pack(linear_of(weight), scales, True)
    act = torch.randn(16, 256, dtype=torch.half, device=DEVICE)

    def run(act: torch.Tensor) -> torch.Tensor:
        out = torch.empty(act.shape[0], 512, dtype=act.dtype, device=act.device)
        marlin.mul_2_4(act, layer.B, layer.meta, out, layer.s, layer.workspace)
        return out

    assert torch.equal(torch.compile(run, fullgraph=True)(act), layer(act))


def test_replaced_layers_of_a_model_are_filled_and_run():
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False)).to(DEVICE)
    marlin.replace_linear(model, lambda name: name == "0", groupsize=128)
    assert isinstance(model[0], marlin.Layer_2_4) and isinstance(model[2], nn.Linear)
    assert model[0].B.is_cuda
    _, scales, weight = quantized(256, 512, 128)
    model[0].pack(linear_of(weight), scales, True)
    act = torch.randn(2, 3, 256, dtype=torch.half, device=DEVICE)
    assert model.half()(act).shape == (2, 3, 256)
