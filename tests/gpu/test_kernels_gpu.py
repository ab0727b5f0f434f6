"""The kernels on a real GPU, through `torch.ops.marlin.*`: every case, every configuration, every bad neighbour.

Outputs are poisoned and lie between guards before each call, and are checked elementwise in float64 (tolerance.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import marlin.ops
from marlin import runtime
from marlin.formats import CompressedWeight, Weight
from marlin.formats.layouts import PackedWeight, pack, unpack
from marlin.runtime import build, cache, catalog
from marlin.testing import cases, emulator, oracle, tolerance

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
REPETITIONS = 1000
_GUARD = 64  # elements on either side of an output
_SENTINEL = 1234.0


def _dtype_id(value: Any) -> str | None:
    return DTYPE_NAMES.get(value) if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="module", autouse=True)
def _all_kernels_built() -> None:
    """Compile what is missing in parallel, since a process compiles one kernel at a time."""
    variants = catalog.all_kernels()
    if cache.info().entries < len(variants):
        major, minor = torch.cuda.get_device_capability()
        build.build_all(variants, [f"{major}{minor}"])


class Output:
    """A poisoned output [M, N] between guards."""

    def __init__(self, m: int, n: int, dtype: torch.dtype) -> None:
        self.buffer = torch.full((m * n + 2 * _GUARD,), _SENTINEL, dtype=dtype, device=DEVICE)
        self.tensor = self.buffer[_GUARD : _GUARD + m * n].view(m, n).fill_(torch.nan)

    def checked(self) -> torch.Tensor:
        """The output, once the guards were found intact."""
        guards = torch.cat((self.buffer[:_GUARD], self.buffer[-_GUARD:]))
        assert bool((guards == _SENTINEL).all()), "written outside of the output"
        return self.tensor


def _product(act: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """act @ weight.T + bias by the operator that writes into a given output."""
    out = Output(act.shape[0], packed.n, act.dtype)
    operands = [packed.codes, packed.scales] if packed.meta is None else [packed.codes, packed.meta, packed.scales]
    operator = getattr(torch.ops.marlin, f"{packed.kind}_out")
    operator(act, *operands, bias, packed.n, packed.group_size, out.tensor)
    return out.checked()


def _weight(n: int, k: int, group_size: int, kind: str, dtype: torch.dtype, seed: int = 0) -> Weight:
    return cases.random_weight(n, k, group_size, kind, dtype=dtype, device=DEVICE, seed=seed)


def _act(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return cases.random_act(m, k, dtype=dtype, device=DEVICE, seed=seed)


def _plan(m: int, packed: PackedWeight, dtype: torch.dtype, config: Any = None) -> Any:
    problem = runtime.Problem(m, packed.n, packed.k, packed.group_size, DTYPE_NAMES[dtype], packed.kind)
    return runtime.plan(problem, torch.cuda.current_device(), config)


# --- values


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_product_is_within_the_tolerance(case: cases.Case):
    act, weight, bias = case.inputs(DEVICE)
    tolerance.check(_product(act, pack(weight), bias), act, weight, bias, name=case.id)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_functional_operator_gives_the_same_and_keeps_leading_dimensions(kind: str):
    weight = _weight(72, 160, 32, kind, torch.float16)
    packed, act = pack(weight), _act(6, 160, torch.float16)
    operands = [packed.codes, packed.scales] if packed.meta is None else [packed.codes, packed.meta, packed.scales]
    out = getattr(torch.ops.marlin, kind)(act.view(2, 3, 160), *operands, None, 72, 32)
    assert out.shape == (2, 3, 72)
    assert torch.equal(out.view(6, 72), _product(act, packed))


@pytest.mark.parametrize("rows", [1, 8, 17, 1000], ids=lambda rows: f"m{rows}")
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 160, 32), (72, 576, 64), (264, 640, 128), (200, 96, -1)])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_one_hot_activations_give_back_the_weight_bit_for_bit(
    kind: str, dtype: torch.dtype, n: int, k: int, group_size: int, rows: int
):
    weight = _weight(n, k, group_size, kind, dtype)
    packed = pack(weight)
    identity = torch.eye(k, dtype=dtype, device=DEVICE)
    if rows == 1:  # one launch a row: a sample of them
        identity = identity[:: max(1, k // 40)]
    product = torch.cat([_product(part, packed) for part in identity.split(rows)])
    expected = weight.to_dense().T
    assert torch.equal(product, expected[:: max(1, k // 40)] if rows == 1 else expected)


def test_fp16_products_beyond_the_range_are_infinite_with_their_sign():
    weight = _weight(64, 256, 128, "w4a16_sp24", torch.float16)
    act = _act(16, 256, torch.float16) * 10000
    out = _product(act.clamp(-65504, 65504), pack(weight))
    ref = oracle.linear(act.clamp(-65504, 65504), weight)
    assert bool(out.isinf().any()) == bool((ref.abs() > 66000).any())
    tolerance.check(out, act.clamp(-65504, 65504), weight)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_more_rows_than_one_launch_takes(kind: str):
    weight = _weight(8, 32, 32, kind, torch.float16)
    act = _act(65536 + 3, 32, torch.float16)
    tolerance.check(_product(act, pack(weight)), act, weight)


# --- every configuration


def _configs() -> Iterator[Any]:
    for kind in cases.KINDS:
        for config in runtime.all_configs(kind):
            yield pytest.param(kind, config, id=f"{kind[6:]}-{config.tag}")


def _launch(plan: Any, act: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """One launch of a plan of ours, with memory of ours; tickets must be zero before and after."""
    out = Output(act.shape[0], packed.n, act.dtype)
    workspace = torch.full((max(plan.workspace_bytes // 4, 1),), torch.nan, device=DEVICE)
    tickets = torch.zeros(max(plan.num_tickets, 1), dtype=torch.int32, device=DEVICE)
    runtime.launch(
        plan,
        act=act.data_ptr(),
        codes=packed.codes.data_ptr(),
        meta=0 if packed.meta is None else packed.meta.data_ptr(),
        scales=packed.scales.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.tensor.data_ptr(),
        workspace=workspace.data_ptr(),
        tickets=tickets.data_ptr(),
        lda=act.stride(0),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    assert not tickets.any(), "tickets must be left zero"
    return out.checked()


@pytest.mark.parametrize("group_size", cases.GROUP_SIZES, ids=lambda g: "grow" if g == -1 else f"g{g}")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=_dtype_id)
@pytest.mark.parametrize(("kind", "config"), _configs())
def test_every_legal_config_is_within_the_tolerance(kind: str, config: Any, dtype: torch.dtype, group_size: int):
    # Rows: one tile and a bit, columns: one tile and a bit, K: chunks that do not fill the last tile of K.
    m, n = config.block_m + 3, config.block_n + 72
    short = 1152 if group_size in (64, 128) or config.family == "sm90" else 1056
    for k in (short, 4096):
        weight = _weight(n, k, group_size, kind, dtype)
        packed, act, bias = pack(weight), _act(m, k, dtype), _act(1, n, dtype, seed=2)[0]
        problem = runtime.Problem(m, n, k, group_size, DTYPE_NAMES[dtype], kind)
        reason = runtime.why_illegal(config, problem, runtime.driver.device_info(torch.cuda.current_device()))
        if reason is not None:
            pytest.skip(reason)
        plan = _plan(m, packed, dtype, config)
        assert plan.config == config
        out = _launch(plan, act, packed, bias)
        tolerance.check(out, act, weight, bias, name=f"{config.tag} k{k}")
        assert torch.equal(_launch(plan, act, packed, bias), out)


@pytest.mark.parametrize(("kind", "config"), _configs())
def test_every_config_adds_a_long_k_in_parts(kind: str, config: Any):
    weight = _weight(64, 16384, 128, kind, torch.float16)
    packed, act = pack(weight), _act(config.block_m, 16384, torch.float16)
    plan = _plan(config.block_m, packed, torch.float16, config)
    assert config.cluster or (plan.num_tickets and plan.workspace_bytes), "this shape is here to be split"
    out = _launch(plan, act, packed, None)
    tolerance.check(out, act, weight, name=config.tag)
    for _ in range(20):
        assert torch.equal(_launch(plan, act, packed, None), out)


# --- run to run


@pytest.mark.parametrize(
    ("m", "n", "k"), [(16, 64, 16384), (1, 1032, 4096), (100, 520, 2048)], ids=lambda extent: str(extent)
)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_thousand_repetitions_are_bit_identical(kind: str, m: int, n: int, k: int):
    weight = _weight(n, k, 128, kind, torch.float16)
    packed, act = pack(weight), _act(m, k, torch.float16)
    shape = _plan(m, packed, torch.float16).geometry
    assert shape.stripe_chunks < shape.num_chunks, "blocks must share the tiles of this shape"
    first = _product(act, packed)
    tolerance.check(first, act, weight)
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    out = torch.empty_like(first)
    operands = [packed.codes, packed.scales] if packed.meta is None else [packed.codes, packed.meta, packed.scales]
    operator = getattr(torch.ops.marlin, f"{kind}_out")
    for _ in range(REPETITIONS):
        out.fill_(torch.nan)
        operator(act, *operands, None, n, 128, out)
        different += (out != first).sum()
    assert int(different) == 0


def test_two_streams_at_once_give_what_each_gives_alone():
    products = []
    for seed, (n, k) in enumerate([(64, 16384), (200, 4096)]):
        packed = pack(_weight(n, k, 128, "w4a16_sp24", torch.float16, seed))
        act = _act(16, k, torch.float16, seed)
        products.append((torch.cuda.Stream(), packed, act, _product(act, packed), []))
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, packed, act, _, outs in products:
            with torch.cuda.stream(stream):
                outs.append(marlin.ops.linear(act, packed))
    torch.cuda.synchronize()
    for *_, expected, outs in products:
        assert all(torch.equal(out, expected) for out in outs)


def test_graph_replays_give_what_eager_gives():
    packed = pack(_weight(200, 4096, 128, "w4a16_sp24", torch.float16))
    act, expected = _act(16, 4096, torch.float16), []
    for seed in range(3):
        expected.append(_product(_act(16, 4096, torch.float16, seed), packed))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = marlin.ops.linear(act, packed)
    for seed in range(3):
        act.copy_(_act(16, 4096, torch.float16, seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected[seed])


# --- inputs of every form


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("m", [1, 16, 130])
@pytest.mark.parametrize("between", [False, True], ids=["alone", "with-others"])
def test_a_chain_of_layers_reads_what_the_layer_before_wrote(kind: str, m: int, between: bool):
    packs = [pack(_weight(1024, 1024, 128, kind, torch.float16, seed=layer)) for layer in range(12)]
    shrink = 0.05  # keeps outputs in range from layer to layer

    def chain(wait: bool) -> list[torch.Tensor]:
        outs, act = [], _act(m, 1024, torch.float16)
        for packed in packs:
            out = marlin.ops.linear(act, packed)
            if wait:
                torch.cuda.synchronize()
            outs.append(out)
            act = out * shrink if between else out.clamp_(-1, 1)
        return outs

    expected = [out.clone() for out in chain(wait=True)]
    for _ in range(30):
        found = chain(wait=False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_chain_without_other_kernels_reads_what_the_layer_before_wrote(kind: str):
    packs = [pack(_weight(1024, 1024, 128, kind, torch.float16, seed=layer)) for layer in range(12)]
    buffers = [Output(16, 1024, torch.float16).tensor for _ in range(13)]
    buffers[0].copy_(_act(16, 1024, torch.float16))

    def chain(wait: bool) -> None:
        for layer, packed in enumerate(packs):
            marlin.ops.linear_out(buffers[layer], packed, buffers[layer + 1])
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = [buffer.clone() for buffer in buffers]
    for _ in range(50):
        for buffer in buffers[1:]:
            buffer.fill_(torch.nan)
        chain(wait=False)
        for found, wanted in zip(buffers, expected, strict=True):
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_rows_with_a_stride_give_what_contiguous_rows_give(kind: str):
    packed = pack(_weight(200, 576, 64, kind, torch.float16))
    wide = _act(33, 576 + 64, torch.float16)
    for start in (0, 8, 64, 3):  # 3: not 16-byte aligned, so copied
        act = wide[:, start : start + 576]
        assert torch.equal(_product(act, packed), _product(act.contiguous(), packed))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("m", [3, 17, 100])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_activations_that_are_not_finite_stay_in_their_own_rows(kind: str, m: int, bad: float):
    weight = _weight(200, 576, 64, kind, torch.float16)
    packed, act = pack(weight), _act(m, 576, torch.float16)
    clean = _product(act, packed)
    column = 301
    kept = weight.mask()[:, column] if isinstance(weight, CompressedWeight) else torch.ones_like(clean[0]).bool()
    for row in {0, m // 2, m - 1}:
        poisoned = act.clone()
        poisoned[row, column] = bad
        out = _product(poisoned, packed)
        others = torch.arange(m, device=DEVICE) != row
        assert torch.equal(out[others], clean[others])
        assert not bool(out[row, kept].isfinite().any())


@pytest.mark.parametrize("m", [1, 17, 257])
@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 32, 32), (72, 96, -1), (200, 160, 32), (136, 64, 64)])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_padding_bytes_change_nothing(kind: str, n: int, k: int, group_size: int, m: int):
    weight = _weight(n, k, group_size, kind, torch.float16)
    packed, act = pack(weight), _act(m, k, torch.float16)
    filled = emulator.fill_padding(packed, 0xFF)
    assert not torch.equal(filled.codes, packed.codes)
    out = _product(act, filled)
    assert torch.equal(out, _product(act, packed))
    tolerance.check(out, act, weight)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_weights_cut_along_n_and_k_give_the_parts_of_the_product(kind: str):
    weight = _weight(200, 576, 64, kind, torch.float16)
    packed, act = pack(weight), _act(16, 576, torch.float16)
    for part, columns in (
        (packed.narrow_n(64, 136), slice(None)),
        (packed.narrow_k(128, 448), slice(128, None)),
    ):
        tensors = {"codes": part.codes.contiguous(), "scales": part.scales.contiguous()}
        if part.meta is not None:
            tensors["meta"] = part.meta.contiguous()
        part = replace(part, **tensors)
        cut = act[:, columns]
        tolerance.check(_product(cut, part), cut, unpack(part))


# --- packing where the weight is


@pytest.mark.parametrize(("n", "k", "group_size"), [(72, 96, 32), (200, 576, 64), (256, 512, 128), (8, 32, -1)])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_on_the_gpu_is_packed_on_the_cpu(kind: str, n: int, k: int, group_size: int):
    weight = cases.random_weight(n, k, group_size, kind)
    tensors = {"codes": weight.codes.to(DEVICE), "scales": weight.scales.to(DEVICE)}
    if isinstance(weight, CompressedWeight):
        tensors["positions"] = weight.positions.to(DEVICE)
    there, here = pack(replace(weight, **tensors)), pack(weight)
    for name in ("codes", "meta", "scales"):
        ours, theirs = getattr(here, name), getattr(there, name)
        assert (ours is None and theirs is None) or (theirs.is_cuda and torch.equal(theirs.cpu(), ours))
    again = unpack(there)
    assert torch.equal(again.codes.cpu(), weight.codes) and torch.equal(again.scales.cpu(), weight.scales)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_emulator_and_kernel_agree_on_the_packed_bytes(kind: str):
    weight = _weight(200, 160, 32, kind, torch.float16)
    packed, act = pack(weight), _act(7, 160, torch.float16)
    emulated = emulator.linear(act, packed)
    torch.testing.assert_close(emulated, oracle.linear(act, weight).cpu(), rtol=0, atol=1e-12)
    torch.testing.assert_close(_product(act, packed).cpu().double(), emulated, rtol=2e-3, atol=2e-3)
