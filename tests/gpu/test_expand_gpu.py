"""Expanded products on the GPU: rows bit for bit, and what cuBLAS makes of them, whatever this GPU would choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlin import ops, runtime
from marlin.formats.layouts import PackedWeight, pack, unpack
from marlin.ops import cuda, expanded
from marlin.runtime.config import GROUP_SIZES
from marlin.runtime.expansion import MAX_SLAB_BYTES, ExpandVariant, Expansion, Slab, cut
from marlin.testing import emulator, tolerance
from marlin.testing.cases import DTYPES, KINDS, random_act, random_weight

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Small slabs, so that small weights have several; the largest has the product's true size.
SLAB_BYTES = 256 << 10


def make_plan(packed: PackedWeight, m: int, max_bytes: int = SLAB_BYTES) -> runtime.Plan:
    """The plan of the portable kernels, to be expanded in slabs of max_bytes."""
    dtype = cuda.DTYPE_NAMES[packed.scales.dtype]
    problem = runtime.Problem(m, packed.n, packed.k, packed.group_size, dtype, packed.kind)
    slabs = cut(packed.n, packed.k, max_bytes)
    found = Expansion(ExpandVariant(packed.kind, dtype, packed.group_size), slabs, packed.k, 1.0)
    return runtime.plan(problem, torch.cuda.current_device(), portable=True)._replace(expansion=found)


def make_packed(kind: str, n: int, k: int, group_size: int = 32, dtype: torch.dtype = torch.float16) -> PackedWeight:
    return pack(random_weight(n, k, group_size, kind, dtype=dtype, device=DEVICE, seed=n + k))


def expand(packed: PackedWeight, slab: Slab) -> torch.Tensor:
    """Rows of a slab, after the memory around them was found untouched."""
    guard = 64 * packed.k
    space = torch.full((slab.rows * packed.k + 2 * guard,), 7.0, dtype=packed.scales.dtype, device=DEVICE)
    out = space[guard:-guard].fill_(torch.nan)
    pointers = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales, "out": out}
    addresses = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()}
    runtime.expand(make_plan(packed, 256), slab, **addresses, stream=torch.cuda.current_stream().cuda_stream)
    assert bool((space[:guard] == 7).all() and (space[-guard:] == 7).all()), "written outside of the output"
    return out.view(slab.rows, packed.k)


def product(packed: PackedWeight, act: torch.Tensor, bias: torch.Tensor | None = None, **plan: Any) -> torch.Tensor:
    out = torch.full((act.shape[0], packed.n), torch.nan, dtype=act.dtype, device=DEVICE)
    operands = (packed.codes, packed.meta, packed.scales, bias)
    return cuda.by_plan(make_plan(packed, act.shape[0], **plan), act, operands, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_expanded_rows_are_the_weight_bit_for_bit(kind: str, group_size: int, dtype: torch.dtype) -> None:
    group = max(group_size, 32)
    for n, k in ((8, group), (72, 3 * group), (200, 37 * group), (4096, 4096)):
        packed = emulator.fill_padding(make_packed(kind, n, k, group_size, dtype), 0xFF)
        tensors = (packed.codes, packed.meta, packed.scales, n, k, group_size, dtype)
        dense = torch.ops.marlin.dequantize(*tensors).view(torch.int16)
        for max_bytes in (1, SLAB_BYTES, 64 << 20):
            for slab in cut(n, k, max_bytes)[:8]:
                found = expand(packed, slab).view(torch.int16)
                assert torch.equal(found, dense[slab.first : slab.first + slab.rows]), (n, k, slab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 1184, 32), (4096, 4096, 128), (520, 14336, 64), (8, 32, -1)])
def test_product_is_within_the_bound_and_repeats_bit_for_bit(
    kind: str, dtype: torch.dtype, n: int, k: int, group_size: int
) -> None:
    packed = make_packed(kind, n, k, group_size, dtype)
    weight, bias = unpack(packed), random_act(1, n, dtype=dtype, device=DEVICE, seed=9)[0]
    for m in (1, 129, 256, 300):
        act = random_act(m, k, dtype=dtype, device=DEVICE, seed=m)
        for max_bytes in (SLAB_BYTES, 8 << 20, MAX_SLAB_BYTES):
            out = product(packed, act, max_bytes=max_bytes)
            tolerance.check(out, act, weight, name=f"m{m}")
            assert all(torch.equal(product(packed, act, max_bytes=max_bytes), out) for _ in range(5))
            # The product is rounded, then its sum with the bias: one rounding more than in the other kernels.
            assert torch.equal(product(packed, act, bias, max_bytes=max_bytes), out + bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_fp32_whatever_torch_allows(dtype: torch.dtype) -> None:
    # A long K and few tiles, so that cuBLAS splits K.
    packed = make_packed("w4a16_dense", 128, 28672, 128, dtype)
    act, matmul = random_act(256, 28672, dtype=dtype, device=DEVICE), torch.backends.cuda.matmul
    names = expanded.fp32_sums[dtype].flags
    before = [getattr(matmul, name, None) for name in names]
    assert True in before, "torch permits less by default"
    tolerance.check(product(packed, act), act, unpack(packed))
    assert [getattr(matmul, name, None) for name in names] == before


def test_act_may_be_rows_apart_and_unaligned() -> None:
    packed = make_packed("w4a16_sp24", 200, 1184)
    wide = random_act(300, 1184 + 64, device=DEVICE)
    for start in (0, 8, 64, 3):
        act = wide[:, start : start + 1184]
        tolerance.check(product(packed, act), act, unpack(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_products_of_new_inputs(kind: str) -> None:
    packed, act = make_packed(kind, 520, 1184), random_act(256, 1184, device=DEVICE)
    expected = [product(packed, random_act(256, 1184, device=DEVICE, seed=seed)).clone() for seed in range(3)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = product(packed, act)
    for seed in range(3):
        act.copy_(random_act(256, 1184, device=DEVICE, seed=seed))
        graph.replay()
        assert torch.equal(out, expected[seed])


def test_two_streams_at_once_give_what_each_gives_alone() -> None:
    products = []
    for seed, kind in enumerate(KINDS):
        packed, act = make_packed(kind, 1032, 4096), random_act(256, 4096, device=DEVICE, seed=seed)
        products.append((torch.cuda.Stream(), packed, act, product(packed, act, max_bytes=1 << 20), []))
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, packed, act, _, outs in products:
            with torch.cuda.stream(stream):
                outs.append(product(packed, act, max_bytes=1 << 20))
    torch.cuda.synchronize()
    for *_, expected, outs in products:
        assert all(torch.equal(out, expected) for out in outs)


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators plan as on a GPU without kernels of its own."""
    plan = runtime.plan
    monkeypatch.setattr(runtime, "plan", lambda problem, index: plan(problem, index, portable=True))
    monkeypatch.setattr(cuda, "_calls", {})
    monkeypatch.setattr(cuda, "_weights", {})


@pytest.mark.usefixtures("as_elsewhere")
@pytest.mark.parametrize("kind", KINDS)
def test_operators_expand_for_many_tokens(kind: str) -> None:
    packed = make_packed(kind, 4096, 4096, 128)
    bias = random_act(1, 4096, device=DEVICE, seed=5)[0]
    described = ops.describe(kind, 4096, 4096, 4096, 128, torch.float16, DEVICE)
    assert described == f"sm80_expand_{kind} + cuBLAS 1x4096"
    act = random_act(4096, 4096, device=DEVICE)
    plain, out = ops.linear(act, packed), ops.linear(act.view(2, 2048, 4096), packed, bias)
    tolerance.check(plain[::37], act[::37], unpack(packed))
    assert out.shape == (2, 2048, 4096) and torch.equal(out, (plain + bias).view(2, 2048, 4096))
    space = torch.full((4098, 4096), torch.nan, dtype=torch.float16, device=DEVICE)
    assert torch.equal(ops.linear_out(act, packed, space[1:-1], bias), out.view(4096, 4096))
    assert bool(space[0].isnan().all() and space[-1].isnan().all())
    few = act[:16]
    tolerance.check(ops.linear(few, packed, bias), few, unpack(packed), bias)


@pytest.mark.usefixtures("as_elsewhere")
def test_operators_expand_below_gradients_and_in_pieces() -> None:
    packed = make_packed("w4a16_dense", 512, 1024, 128)
    dense = unpack(packed).to_dense(torch.float16)
    act = random_act(65536 + 2048, 1024, device=DEVICE).requires_grad_()
    out = ops.linear(act, packed)
    tolerance.check(out[::997], act[::997], unpack(packed))
    out[:8].float().square().sum().backward()
    assert act.grad is not None
    expected = (2 * out[:8].detach()).double() @ dense.double()
    largest = float(expected.abs().max())
    torch.testing.assert_close(act.grad[:8].double(), expected, rtol=1e-2, atol=1e-2 * largest)
    assert not act.grad[8:].any()
