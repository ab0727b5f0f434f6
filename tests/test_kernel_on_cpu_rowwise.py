"""The kernels between products, built for the host with g++: against torch, bit for bit where sums are exact.

Proves tails, strides, the sum over a block, and that nothing is read before the kernel before has ended.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from marlin import ops
from marlin.runtime.rowwise import OPS, RowwisePlan, RowwiseVariant, make_rowwise_plan
from tests.kernel_on_cpu.machine import GPU, Fault, built, check_run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the kernels for the host")

_DTYPES = (torch.float16, torch.bfloat16)
EPS = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values whose squares add up exactly in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def run(
    plan: RowwisePlan, folder: Path, inputs: tuple[torch.Tensor, ...], seed: int, *fault: Fault
) -> tuple[torch.Tensor, ...]:
    """Outputs of the plan's kernel. Inputs but the weight appear as late as the kernel before can leave them."""
    library, norm = built(plan.variant, folder, *fault), plan.variant.kind != "silu_and_mul"
    x, *rest = inputs
    late = [x, *rest[:-1]] if norm else [x]
    contents = [tensor.contiguous() for tensor in late]
    tensors = [torch.full_like(tensor, torch.nan) for tensor in contents]
    if x.stride(0) != x.shape[1]:  # rows of a wider tensor
        wide = x.as_strided((x.shape[0], x.stride(0)), (x.stride(0), 1)).contiguous()
        contents[0], tensors[0] = wide, torch.full_like(wide, torch.nan)
    words = []
    for tensor, content in zip(tensors, contents, strict=True):
        words += [tensor.data_ptr(), content.data_ptr(), tensor.nbytes]
    left = ((ctypes.c_uint64 * len(words))(*words), len(tensors))
    rows, count = x.shape[0], 2 if plan.variant.kind == "fused_add_rms_norm" else 1
    guard = 64
    spaces = [torch.full((rows * plan.width + 2 * guard,), 7.0, dtype=x.dtype) for _ in range(count)]
    outs = [space[guard:-guard].fill_(torch.nan) for space in spaces]
    at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, *outs)]
    if norm:
        own = at[1] if count == 2 else None
        weight = ctypes.c_void_p(rest[-1].data_ptr())
        args = (at[0], own, weight, at[len(tensors)], at[-1], plan.width, x.stride(0), plan.width, ctypes.c_float(EPS))
        check_run(library.run_norm(*args, plan.grid, plan.threads, seed, *left))
    else:
        args = (at[0], at[1], plan.width, x.stride(0), plan.blocks_of_a_row)
        check_run(library.run_silu(*args, plan.grid, plan.threads, seed, *left))
    for space in spaces:
        assert bool((space[:guard] == 7).all() and (space[-guard:] == 7).all()), "written outside of the output"
    return tuple(out.view(rows, plan.width) for out in outs)


def expected(op: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = getattr(ops, op)(*inputs) if op == "silu_and_mul" else getattr(ops, op)(*inputs, EPS)
    return found if isinstance(found, tuple) else (found,)


def case(op: str, rows: int, width: int, dtype: torch.dtype, stride: int = 0) -> tuple[torch.Tensor, ...]:
    columns = 2 * width if op == "silu_and_mul" else width
    x = whole_numbers(rows, columns + stride, dtype=dtype, seed=width)[:, :columns]
    if op == "silu_and_mul":
        return (x,)
    weight = whole_numbers(width, dtype=dtype, seed=2) / 8
    return (x, whole_numbers(rows, width, dtype=dtype, seed=3), weight) if op == "fused_add_rms_norm" else (x, weight)


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], op: str) -> bool:
    """Bit for bit; but silu's exponential and the root are of the host, within two units in the last place."""
    rtol = 2 ** (-9 if found[0].dtype == torch.float16 else -6)
    sums = torch.equal(found[-1], wanted[-1]) if op == "fused_add_rms_norm" else True
    return sums and torch.allclose(found[0].float(), wanted[0].float(), rtol=rtol, atol=1e-6)


# The least, a part of a warp, odd numbers of warps, more pieces a thread; rows of a wider tensor.
@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", OPS)
def test_rows_are_as_torch_computes_them(op: str, dtype: torch.dtype, folder: Path) -> None:
    for seed, (rows, width, stride) in enumerate([(1, 8, 0), (3, 264, 8), (2, 776, 24), (1, 4104, 0), (1, 8200, 8)]):
        plan = make_rowwise_plan(op, rows, width, str(dtype).removeprefix("torch."), GPU, early=True)
        assert plan.variant.early
        inputs = case(op, rows, width, dtype, stride)
        assert same(run(plan, folder, inputs, seed), expected(op, inputs), op)


@pytest.mark.parametrize("op", OPS)
def test_rows_are_the_same_without_early_starts(op: str, folder: Path) -> None:
    plan, inputs = make_rowwise_plan(op, 3, 776, "float16", GPU, early=False), case(op, 3, 776, torch.float16, 8)
    assert not plan.variant.early
    assert same(run(plan, folder, inputs, 1), expected(op, inputs), op)


@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_many_rows_of_silu_take_larger_blocks(dtype: torch.dtype, folder: Path) -> None:
    plan = make_rowwise_plan("silu_and_mul", 24, 2056, str(dtype).removeprefix("torch."), GPU, early=True)
    assert plan.variant.pieces == 2
    inputs = case("silu_and_mul", 24, 2056, dtype)
    assert same(run(plan, folder, inputs, 1), expected("silu_and_mul", inputs), "silu_and_mul")


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("fused_add_rms_norm", ("    __syncthreads();\n", "")),
        ("fused_add_rms_norm", ("if constexpr (kEarly) wait_for_previous_kernel();", "")),
        ("silu_and_mul", ("if constexpr (kEarly) wait_for_previous_kernel();", "")),
        ("fused_add_rms_norm", ("lane < blockDim.x / 32 ? sums[lane] : 0.0f", "sums[lane % 16]")),
        ("rms_norm", ("row * args.x_stride", "row * args.hidden")),
        ("rms_norm", ("if (piece >= pieces) continue;", "if (piece > pieces) continue;")),
        ("silu_and_mul", ("if (piece >= pieces) continue;", "if (piece > pieces) continue;")),
        ("silu_and_mul", ("gates + args.width", "gates + args.x_stride / 2")),
    ],
    ids=["barrier", "wait", "wait-silu", "warps", "stride", "tail", "tail-silu", "up"],
)
def test_host_build_shows_planted_faults(op: str, fault: Fault, folder: Path) -> None:
    plan, inputs = make_rowwise_plan(op, 3, 776, "float16", GPU, early=True), case(op, 3, 776, torch.float16, 16)
    with pytest.raises(AssertionError):
        for seed in range(6):
            assert same(run(plan, folder, inputs, seed, fault), expected(op, inputs), op)


def test_wide_rows_are_refused_where_a_block_cannot_hold_them() -> None:
    widths = [8, 4096, 4104, 8192, 8200, 32768]
    plans = [make_rowwise_plan("rms_norm", 5, width, "float16", GPU) for width in widths]
    assert [(plan.variant.pieces, plan.threads) for plan in plans] == [
        (1, 32),
        (1, 512),
        (2, 288),
        (2, 512),
        (4, 288),
        (4, 1024),
    ]
    assert all(isinstance(plan.variant, RowwiseVariant) and plan.grid == 5 for plan in plans)
