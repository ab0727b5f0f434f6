"""What is timed: the fp16 baseline and the project's own kernels, on random weights of a shape.

Owns how a weight is made, copied so that it is cold, checked and called. Peers of other projects are in
`benchmarks.peers`; timing is in `benchmarks.timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import machine, timing, traffic
from marlin import ops, runtime, settings
from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, num_groups
from marlin.formats.layouts import PackedWeight, pack
from marlin.formats.sparsity import LEGAL_NIBBLES
from marlin.ops.cuda import DTYPE_NAMES, by_plan
from marlin.testing import tolerance

# The implementation of our operator in batch-invariant mode, beside "marlin".
BATCH_INVARIANT = "marlin-batch-invariant"
# The same on a GPU without kernels of its own.
PORTABLE = "marlin-portable"
# Rows of M whose results are checked; both ends are among them.
CHECKED_ROWS = 512


# call(i, act, out): the product with copy i, written to out where the implementation can.
Call = Callable[[int, torch.Tensor, torch.Tensor], object]


class AbsentError(Exception):
    """This implementation cannot take part here; the text says why."""


@dataclass(frozen=True)
class Setting:
    """What a candidate is built for."""

    n: int
    k: int
    dtype: torch.dtype
    group_size: int
    l2_bytes: int
    device: torch.device = field(default_factory=lambda: machine.device())

    def copies(self, op: str) -> int:
        return timing.copies_for(traffic.weight_bytes(op, self.n, self.k, self.group_size), self.l2_bytes)

    def random_act(self, m: int) -> torch.Tensor:
        return torch.randn(m, self.k, device=self.device).to(self.dtype)

    def random_dense(self) -> torch.Tensor:
        return (torch.randn(self.n, self.k, device=self.device) * 0.02).to(self.dtype)


@dataclass(frozen=True)
class Prepared:
    """One implementation with its copies of a weight.

    check(act, out): raises AssertionError; None for others' kernels. config(m): what would run, or None.
    record(m): what replays calls of M rows, where that is not a graph of `call` (another process).
    meta_bits: metadata per group of four, None where there is none.
    """

    impl: str
    op: str
    copies: int
    call: Call
    check: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    config: Callable[[int], str | None] = lambda m: None
    record: Callable[[int], timing.Recorded] | None = None
    meta_bits: int | None = None

    @property
    def key(self) -> str:
        return f"{self.impl}:{self.op}"


Factory = Callable[[Setting], Prepared]


def random_weight(kind: str, setting: Setting) -> Weight:
    """A random canonical weight on the device, with scales that keep fp16 outputs in range."""
    n, k, device = setting.n, setting.k, setting.device
    shape = (n, num_groups(k, setting.group_size, "benchmarks"))
    scales = ((torch.rand(shape, device=device) + 0.5) * 0.01).to(setting.dtype)
    if kind == "w4a16_dense":
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
        return DenseInt4Weight(codes, scales, setting.group_size)
    codes = torch.randint(-8, 8, (n, k // 2), dtype=torch.int8, device=device)
    return CompressedWeight(codes, random_positions(n, k // 4, device), scales, setting.group_size)


def random_positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Random legal 2:4 nibbles, uint8 [rows, columns]."""
    legal = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8, device=device)
    return legal[torch.randint(0, len(LEGAL_NIBBLES), (rows, columns), device=device)]


def cublas(setting: Setting) -> Prepared:
    """torch.mm on 16-bit weights."""
    weights = [setting.random_dense().T for _ in range(setting.copies("fp16"))]
    return Prepared("cublas", "fp16", len(weights), lambda i, act, out: torch.mm(act, weights[i], out=out))


def _check_rows(weight: Weight, act: torch.Tensor, out: torch.Tensor) -> None:
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{int((~out.isfinite()).sum())} of {out.numel()} entries are not finite or not written")
    rows = torch.linspace(0, act.shape[0] - 1, min(CHECKED_ROWS, act.shape[0]), device=act.device).long()
    tolerance.check(out[rows], act[rows], weight)


def meta_bits(packed: PackedWeight) -> int | None:
    """Bits of metadata per group of four, by the size of the tensor; None where there is none."""
    if packed.meta is None:
        return None
    # Codes take 2 bits a weight, 8 bits a group of four, padding included.
    return round(8 * packed.meta.nbytes / packed.codes.nbytes)


def _clone(packed: PackedWeight) -> PackedWeight:
    meta = None if packed.meta is None else packed.meta.clone()
    return replace(packed, codes=packed.codes.clone(), meta=meta, scales=packed.scales.clone())


@contextmanager
def _mode(batch_invariant: bool) -> Iterator[None]:
    before = settings.batch_invariant()
    settings.set_batch_invariant(batch_invariant)
    try:
        yield
    finally:
        settings.set_batch_invariant(before)


def _packed(kind: str, setting: Setting) -> tuple[Weight, list[PackedWeight]]:
    """A random weight and its packed copies."""
    weight = random_weight(kind, setting)
    first = pack(weight, setting.dtype)
    return weight, [first, *(_clone(first) for _ in range(setting.copies(kind) - 1))]


def _check_twice(call: Call, weight: Weight, act: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Raises AssertionError where a product is wrong or another run differs, whose output it returns."""
    call(0, act, out.fill_(torch.nan))
    _check_rows(weight, act, out)
    again = torch.full_like(out, torch.nan)
    call(-1, act, again)
    if not torch.equal(again, out):
        raise AssertionError("two runs on equal weights differ")
    return again


def marlin(kind: str, *, batch_invariant: bool = False) -> Factory:
    """Factory of the project's operator of `kind`, through `marlin.ops.linear_out`, in batch-invariant mode or not."""

    def build(setting: Setting) -> Prepared:
        weight, copies = _packed(kind, setting)

        def check(act: torch.Tensor, out: torch.Tensor) -> None:
            again = _check_twice(call, weight, act, out)
            if batch_invariant:
                call(0, act[-1:].clone(), again[:1])
                if not torch.equal(again[:1], out[-1:]):
                    raise AssertionError("a row alone differs from the same row in a batch")

        def config(m: int) -> str:
            with _mode(batch_invariant):
                return ops.describe(kind, m, setting.n, setting.k, setting.group_size, setting.dtype, setting.device)

        def call(i: int, act: torch.Tensor, out: torch.Tensor) -> Any:
            with _mode(batch_invariant):
                return ops.linear_out(act, copies[i], out)

        impl = BATCH_INVARIANT if batch_invariant else "marlin"
        return Prepared(impl, kind, len(copies), call, check, config, meta_bits=meta_bits(copies[0]))

    return build


def portable(kind: str) -> Factory:
    """Factory of what a GPU without kernels of its own runs, where this one has them; else `marlin` is that."""

    def build(setting: Setting) -> Prepared:
        if setting.device.type != "cuda":
            raise AbsentError("kernels need a GPU")
        index = setting.device.index or 0

        def plan(m: int, *, portable: bool = True) -> runtime.Plan:
            name = DTYPE_NAMES[setting.dtype]
            problem = runtime.Problem(m, setting.n, setting.k, setting.group_size, name, kind)
            return runtime.plan(problem, index, portable=portable)

        if plan(1, portable=False).config.family == plan(1).config.family:
            raise AbsentError("the portable kernels are this GPU's own")
        weight, copies = _packed(kind, setting)

        def call(i: int, act: torch.Tensor, out: torch.Tensor) -> Any:
            one = copies[i]
            return by_plan(plan(act.shape[0]), act, (one.codes, one.meta, one.scales, None), out)

        def check(act: torch.Tensor, out: torch.Tensor) -> None:
            _check_twice(call, weight, act, out)

        bits = meta_bits(copies[0])
        return Prepared(PORTABLE, kind, len(copies), call, check, lambda m: plan(m).runs, meta_bits=bits)

    return build
