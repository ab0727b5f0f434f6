"""What the CUDA implementation hands to the runtime, tried on the CPU: a launcher that sees the pointers alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from marlin import ops, runtime, settings
from marlin.formats.layouts import TILE_WORDS, PackedWeight, pack, unpack
from marlin.ops import cuda, expanded, scratch
from marlin.runtime import expansion
from marlin.testing import tolerance
from marlin.testing.cases import random_weight

KINDS = ("w4a16_sp24", "w4a16_dense")


class FakePlan(NamedTuple):
    problem: Any
    workspace_bytes: int
    num_tickets: int
    expansion: Any = None


def read(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (extent * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


class FakeRuntime:
    """Plans and launches as `marlin.runtime` does, with memory of this process for a GPU."""

    def __init__(self, workspace_bytes: int = 4096, num_tickets: int = 7) -> None:
        self.workspace_bytes, self.num_tickets = workspace_bytes, num_tickets
        self.launches: list[dict[str, Any]] = []
        self.slabs: list[tuple[Any, int, int]] = []  # with address and stream
        self.max_slab_bytes = 0  # expands when positive
        self.plans = self.packed = 0

    def plan(self, problem: Any, device_index: int) -> FakePlan:
        self.plans += 1
        found = None
        if self.max_slab_bytes:
            variant = expansion.ExpandVariant(problem.kind, problem.dtype, problem.group_size)
            slabs = expansion.cut(problem.n, problem.k, self.max_slab_bytes)
            found = expansion.Expansion(variant, slabs, problem.k, 1.0)
        return FakePlan(problem, self.workspace_bytes, self.num_tickets, found)

    def expand(self, plan: FakePlan, slab: Any, *, out: int, stream: int, **at: int) -> None:
        self.slabs.append((slab, out, stream))
        dtype = getattr(torch, plan.problem.dtype)
        dense = unpack(self.weight(plan.problem, at)).to_dense(dtype)
        read(out, (slab.rows, plan.problem.k), (plan.problem.k, 1), dtype).copy_(dense[slab.first :][: slab.rows])

    def launch(self, plan: FakePlan, **at: Any) -> None:
        self.launches.append({"m": plan.problem.m, "batch_invariant": plan.problem.batch_invariant, **at})
        p = plan.problem
        dtype = getattr(torch, p.dtype)
        assert at["act"] % 16 == at["out"] % 16 == 0
        act = read(at["act"], (p.m, p.k), (at["lda"], 1), dtype)
        bias = read(at["bias"], (p.n,), (1,), dtype) if at["bias"] else None
        read(at["out"], (p.m, p.n), (p.n, 1), dtype).copy_(ops.cpu.linear(act, self.weight(p, at), bias))
        if plan.num_tickets:
            assert not read(at["tickets"], (plan.num_tickets,), (1,), torch.int32).any()
        if plan.workspace_bytes and at["workspace"]:
            read(at["workspace"], (plan.workspace_bytes // 4,), (1,), torch.float32).fill_(torch.nan)

    def freeze(self, plan: FakePlan, *, weight: tuple[int, int, int], **at: Any) -> Callable[[], bool]:
        assert not plan.num_tickets and plan.expansion is None
        at |= dict(zip(("codes", "meta", "scales"), weight, strict=True))
        self.packed += 1

        def again() -> bool:
            self.launch(plan, workspace=0, tickets=0, **at)
            return True

        return again

    def weight(self, p: Any, at: dict[str, int]) -> PackedWeight:
        dtype = getattr(torch, p.dtype)
        tiles = (-(-p.n // 64), -(-p.k // 64))
        groups = 1 if p.group_size == -1 else p.k // p.group_size
        for name in ("codes", "meta", "scales"):
            assert at[name] % 16 == 0

        def packed(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            strides = (shape[1] * shape[2], shape[2], 1)
            return read(at[name], shape, strides, dtype).clone()

        codes, meta = TILE_WORDS[p.kind]
        assert (at["meta"] != 0) == (meta > 0)
        return PackedWeight(
            p.kind,
            packed("codes", (*tiles, codes), torch.int32),
            packed("meta", (*tiles, meta), torch.int32) if meta else None,
            packed("scales", (tiles[0], groups, 64), dtype),
            *(p.n, p.k, p.group_size),
        )


@pytest.fixture(params=[7, 0], ids=["tickets", "no-tickets"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    stand_in = FakeRuntime(num_tickets=request.param)
    monkeypatch.setattr(runtime, "plan", stand_in.plan)
    monkeypatch.setattr(runtime, "launch", stand_in.launch)
    monkeypatch.setattr(runtime, "freeze", stand_in.freeze)
    monkeypatch.setattr(runtime, "expand", stand_in.expand)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 5)
    monkeypatch.setattr(cuda, "_capture_id", lambda stream: 0)
    monkeypatch.setattr(cuda, "_current_device", lambda: -1)
    monkeypatch.setattr(cuda, "_empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(cuda, "_calls", {})
    monkeypatch.setattr(cuda, "_weights", {})
    for name in ("_of_stream", "_of_capture", "_arenas"):
        monkeypatch.setattr(scratch, name, {})
    return stand_in


def run(packed: PackedWeight, act: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None):
    return cuda.linear(
        packed.kind, act, (packed.codes, packed.meta, packed.scales, bias), packed.n, packed.group_size, out
    )


def make(kind: str = "w4a16_sp24") -> PackedWeight:
    return pack(random_weight(72, 96, 32, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_launch_gets_pointers_that_give_the_product(fake, kind):
    packed, act, bias = make(kind), torch.randn(5, 96).half(), torch.randn(72).half()
    assert torch.equal(run(packed, act, bias), ops.linear(act, packed, bias))
    (launch,) = fake.launches
    assert (launch["act"], launch["codes"], launch["lda"]) == (act.data_ptr(), packed.codes.data_ptr(), 96)
    assert (launch["bias"], launch["stream"]) == (bias.data_ptr(), 5)


ACTS = {
    "rows-apart": (lambda a: torch.cat([a, a], 1)[:, :96], 192),
    "3d-rows-apart": (lambda a: torch.cat([a, a], 1).view(2, 3, 192)[..., :96], 192),
    "transposed": (lambda a: a.T.contiguous().T, 96),
    "odd-stride": (lambda a: torch.cat([a, a[:, :1]], 1)[:, :96], 96),
    "misaligned": (lambda a: torch.cat([a[0, :1], a.flatten()])[1:].view(6, 96), 96),
    "expanded": (lambda a: a[:1].expand(6, 96), 96),
    "every-second-row": (lambda a: a[::2], 192),
}


@pytest.mark.parametrize("name", ACTS)
def test_launch_copies_act_only_where_kernels_cannot_read_it(fake, name):
    change, lda = ACTS[name]
    packed, act = make(), change(torch.randn(6, 96).half())
    assert torch.equal(run(packed, act), ops.linear(act, packed))
    (launch,) = fake.launches
    assert launch["lda"] == lda
    assert (launch["act"] == act.data_ptr()) == (lda == 192)


def test_launch_splits_many_rows(fake, monkeypatch):
    monkeypatch.setattr("marlin.runtime.config.MAX_M", 4)
    packed = make()
    for act in (torch.randn(10, 96).half(), torch.randn(10, 192).half()[:, :96]):
        assert torch.equal(run(packed, act), ops.linear(act, packed))
    assert [launch["m"] for launch in fake.launches] == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_nothing_is_launched_for_no_rows(fake, shape):
    assert run(make(), torch.empty(shape).half()).shape == (*shape[:-1], 72)
    assert not fake.launches


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_launch_writes_a_given_output(fake, offset):
    packed, act = make(), torch.randn(5, 96).half()
    whole = torch.full((5 * 72 + offset,), torch.nan, dtype=torch.float16)
    out = whole[offset:].view(5, 72)
    assert run(packed, act, out=out) is out
    assert torch.equal(out, ops.linear(act, packed))


def test_launch_copies_a_misaligned_bias(fake):
    packed, act, bias = make(), torch.randn(5, 96).half(), torch.randn(73).half()[1:]
    assert torch.equal(run(packed, act, bias), ops.linear(act, packed, bias))


def test_checks_and_plans_are_remembered_per_signature(fake, monkeypatch):
    packed, other = make(), pack(random_weight(72, 96, 32, seed=1))
    for act, weight in ((torch.randn(5, 96), packed), (torch.randn(5, 96), other), (torch.randn(6, 96), packed)):
        run(weight, act.half())
    assert (fake.plans, len(fake.launches)) == (2, 3)
    monkeypatch.setattr(cuda, "_MAX_REMEMBERED", 2)
    run(packed, torch.randn(7, 96).half())
    assert len(cuda._calls) == 1


def test_later_calls_of_a_weight_check_nothing_again(fake, monkeypatch):
    packed, acts = make(), [torch.randn(5, 96).half() for _ in range(2)]
    run(packed, acts[0])
    monkeypatch.setattr(cuda, "_remember", None)
    assert torch.equal(run(packed, acts[1]), ops.linear(acts[1], packed))


def test_launches_that_come_again_are_packed_once(fake, monkeypatch):
    packed, acts = make(), [torch.randn(5, 96).half() for _ in range(2)]
    out, stream = torch.empty(5, 72).half(), [5]
    monkeypatch.setattr(cuda, "_empty", lambda *_: out.fill_(torch.nan))
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: stream[0])
    for turn in range(5):
        for act in acts:
            act.normal_()
            assert torch.equal(run(packed, act), ops.linear(act, packed))
        assert fake.packed == (0 if fake.num_tickets or turn == 0 else 2)
    assert len(fake.launches) == 10 and len({str(launch) for launch in fake.launches[-4:]}) == 2
    stream[0] = 6
    run(packed, acts[0])
    assert fake.launches[-1]["stream"] == 6
    bias = torch.randn(72).half()
    for _ in range(3):
        assert torch.equal(run(packed, acts[0], bias.normal_()), ops.linear(acts[0], packed, bias))


def test_a_packed_launch_that_does_not_go_is_launched_as_the_first(fake, monkeypatch):
    packed, act = make(), torch.randn(5, 96).half()
    out, tried = torch.empty(5, 72).half(), []
    monkeypatch.setattr(cuda, "_empty", lambda *_: out)
    monkeypatch.setattr(runtime, "freeze", lambda plan, **at: lambda: bool(tried.append(at)))
    for turn in range(4):
        assert torch.equal(run(packed, act.normal_()), ops.linear(act, packed))
        assert len(fake.launches) == turn + 1
    assert len(tried) == (0 if fake.num_tickets else 2)


def test_few_packed_launches_are_kept(fake, monkeypatch):
    packed, out = make(), torch.empty(1, 72).half()
    monkeypatch.setattr(cuda, "_empty", lambda *_: out)
    acts = torch.randn(cuda._MAX_PACKED + 3, 1, 96).half()
    for act in [*acts, *acts]:
        assert torch.equal(run(packed, act), ops.linear(act, packed))
    (weight,) = cuda._weights.values()
    assert len(weight.again) <= cuda._MAX_PACKED


def test_remembered_signatures_do_not_excuse_other_tensors(fake):
    packed, act = make(), torch.randn(5, 96).half()
    run(packed, act)
    wrong = PackedWeight(packed.kind, packed.codes[:1], packed.meta, packed.scales, 72, 96, 32)
    with pytest.raises(ValueError, match="codes must have shape"):
        run(wrong, act)
    with pytest.raises(TypeError, match="act and scales must have the same dtype"):
        run(packed, act.bfloat16())
    with pytest.raises(ValueError, match="scales must have shape"):
        cuda.linear(packed.kind, act, (packed.codes, packed.meta, packed.scales, None), 72, -1)


@pytest.mark.parametrize("name", ["codes", "meta", "scales"])
def test_remembered_weights_see_memory_that_was_exchanged(fake, name):
    packed, other, act = make(), pack(random_weight(72, 96, 32, seed=1)), torch.randn(5, 96).half()
    run(packed, act)
    getattr(packed, name).data = getattr(other, name)
    assert torch.equal(run(packed, act), ops.linear(act, packed))
    assert fake.launches[-1][name] == getattr(other, name).data_ptr()


def test_remembered_weights_take_another_bias_each_time(fake):
    packed, act = make(), torch.randn(5, 96).half()
    odd = torch.randn(73).half()[1:]  # not on 16 bytes: copied for every call
    for bias in (torch.randn(72).half(), torch.randn(72).half(), None, odd, odd.neg_()):
        assert torch.equal(run(packed, act, bias), ops.linear(act, packed, bias))


def test_weights_are_forgotten_with_their_tensors(fake):
    packed, act = make(), torch.randn(5, 96).half()
    run(packed, act)
    assert len(cuda._weights) == 1
    del packed
    gc.collect()
    assert not cuda._weights


def test_batch_invariant_mode_is_planned_for_and_remembered_apart(fake, monkeypatch):
    packed, act = make(), torch.randn(5, 96).half()
    for on in (False, True, False, True):
        monkeypatch.setattr(settings, "_batch_invariant", on)
        run(packed, act)
        assert fake.launches[-1]["batch_invariant"] is on
    assert fake.plans == 2


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_only_plain_calls_pass_by_the_dispatcher():
    act, seen = torch.randn(2, 96), []
    assert ops.is_plain(act)
    for mode in (_Counting, _Watching, torch.profiler.profile, lambda: torch.device("cpu")):
        with mode():
            seen.append(ops.is_plain(act))
    torch.func.vmap(lambda row: (seen.append(ops.is_plain(row)), row)[1])(act)
    torch.jit.trace(lambda row: (seen.append(ops.is_plain(row)), row + 1)[1], (act,), check_trace=False)
    seen.append(ops.is_plain(torch.nn.Parameter(act)))
    seen.append(ops.is_plain(torch._neg_view(act)))
    assert seen and not any(seen)
    assert ops.is_plain(act)


def test_packed_tensors_must_be_contiguous_and_aligned(fake):
    wide = pack(random_weight(72, 192, 32))
    with pytest.raises(ValueError) as caught:
        run(wide.narrow_k(0, 128), torch.randn(5, 128).half())
    assert str(caught.value) == (
        "w4a16_sp24: codes must be contiguous on CUDA; got strides (768, 256, 1). "
        "Call .contiguous() once, after cutting the packed weight."
    )
    packed = make()
    scales = torch.cat([packed.scales.flatten()[:1], packed.scales.flatten()])[1:].view_as(packed.scales)
    with pytest.raises(ValueError) as caught:
        run(PackedWeight(packed.kind, packed.codes, packed.meta, scales, 72, 96, 32), torch.randn(5, 96).half())
    assert str(caught.value) == (
        f"w4a16_sp24: packed tensors must start on 16 bytes; got codes at {packed.codes.data_ptr():#x}, "
        f"meta at {packed.meta.data_ptr():#x}, scales at {scales.data_ptr():#x}. Clone them."
    )


class TestSplitKMemory:
    """Who shares split-K memory, and that tickets start at zero."""

    cpu = torch.device("cpu")

    def test_a_stream_keeps_its_memory_and_grows_it(self, fake):
        memory = scratch.split_k_memory(self.cpu, 5, 0)
        assert scratch.split_k_memory(self.cpu, 5, 0) is memory
        assert scratch.split_k_memory(self.cpu, 6, 0) is not memory
        parts, tickets = memory.reserve(5000, 3)
        assert parts.numel() == 8192 and tickets.numel() == 1024 and not tickets.any()
        again = memory.reserve(8192, 1024)
        assert (again[0] is parts, again[1] is tickets) == (True, True)
        larger = memory.reserve(8193, 1025)
        assert larger[0].numel() == 16384 and larger[1].numel() == 2048 and not larger[1].any()

    def test_a_capture_has_its_own_tickets_and_keeps_no_parts(self, fake):
        eager = scratch.split_k_memory(self.cpu, 5, 0).reserve(64, 4)
        first = scratch.split_k_memory(self.cpu, 5, 11)
        parts, tickets = first.reserve(64, 4)
        assert first.reserve(64, 4)[0] is not parts
        assert scratch.split_k_memory(self.cpu, 5, 11) is first
        other = scratch.split_k_memory(self.cpu, 5, 12).reserve(64, 4)
        assert len({eager[1].data_ptr(), tickets.data_ptr(), other[1].data_ptr()}) == 3

    def test_kept_memory_does_not_depend_on_inference_mode(self, fake):
        with torch.inference_mode():
            parts, tickets = scratch.split_k_memory(self.cpu, 5, 0).reserve(64, 4)
        assert not parts.is_inference() and not tickets.is_inference()

    def test_threads_on_one_stream_share_one_memory(self, fake):
        packed, acts = make(), [torch.randn(3, 96).half() for _ in range(8)]
        results: dict[int, torch.Tensor] = {}
        threads = [threading.Thread(target=lambda i=i: results.update({i: run(packed, acts[i])})) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[i], ops.linear(acts[i], packed)) for i in range(8))
        assert len(scratch._of_stream) == (fake.num_tickets > 0)

    def test_plans_without_split_k_get_none(self, fake):
        fake.num_tickets = fake.workspace_bytes = 0
        run(make(), torch.randn(3, 96).half())
        assert (fake.launches[0]["workspace"], fake.launches[0]["tickets"]) == (0, 0)
        assert not scratch._of_stream


class TestExpandedProducts:
    """Slabs that are expanded and multiplied by torch in place of a launch."""

    @pytest.fixture
    def expanding(self, fake: FakeRuntime) -> FakeRuntime:
        fake.max_slab_bytes = 64 * 96 * 2
        return fake

    @pytest.mark.parametrize("name", ACTS)
    @pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
    def test_take_act_of_any_layout(self, expanding, name, biased):
        packed, act = make(), ACTS[name][0](torch.randn(6, 96).half())
        bias = torch.randn(72).half() if biased else None
        out = run(packed, act, bias)
        assert out.shape == (*act.shape[:-1], 72) and out.is_contiguous() and not expanding.launches
        seen, plain = len(expanding.slabs), run(packed, act)
        tolerance.check(plain.view(-1, 72), act.reshape(-1, 96), unpack(packed))
        assert torch.equal(out, plain if bias is None else plain + bias), "rounded, and rounded again with the bias"
        del expanding.slabs[seen:]
        assert [(tuple(slab), stream) for slab, _, stream in expanding.slabs] == [((0, 64), 5), ((64, 8), 5)]
        assert expanding.slabs[0][1] == expanding.slabs[1][1]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_write_a_given_output(self, expanding, kind, dtype):
        packed, act = pack(random_weight(72, 96, 32, kind, dtype=dtype)), torch.randn(5, 96).to(dtype)
        for offset in (0, 1):
            out = torch.full((5 * 72 + offset,), torch.nan, dtype=dtype)[offset:].view(5, 72)
            assert run(packed, act, out=out) is out
            tolerance.check(out, act, unpack(packed))

    def test_are_cut_where_launches_are(self, expanding, monkeypatch):
        monkeypatch.setattr("marlin.runtime.config.MAX_M", 4)
        packed, act = make(), torch.randn(2, 5, 192).half()[..., :96]
        tolerance.check(run(packed, act).view(10, 72), act.reshape(10, 96), unpack(packed))
        assert len(expanding.slabs) == 3 * 2

    def test_take_tensors_of_either_mode_and_a_bias_that_wants_gradients(self, expanding):
        packed, bias = make(), torch.randn(72).half().requires_grad_()
        with torch.inference_mode():
            act, out = torch.randn(5, 96).half(), torch.empty(5, 72, dtype=torch.float16)
        for one in (act, act.clone()):
            run(packed, one, bias, out)
            assert torch.equal(out, run(packed, one) + bias.detach())

    def test_are_not_used_where_torch_must_be_deterministic(self, expanding):
        packed, act = make(), torch.randn(5, 96).half()
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(run(packed, act), ops.linear(act, packed))
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(expanding.launches) == 1 and not expanding.slabs

    def test_by_plan_runs_what_it_is_given(self, fake, expanding, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        packed, act = make(), torch.randn(5, 96).half()
        plan = fake.plan(runtime.Problem(5, 72, 96, 32, "float16", "w4a16_sp24"), 0)
        operands = (packed.codes, packed.meta, packed.scales, None)
        for one in (plan, plan._replace(expansion=None)):
            out = torch.full((5, 72), torch.nan, dtype=torch.float16)
            assert cuda.by_plan(one, act, operands, out) is out
            tolerance.check(out, act, unpack(packed))
        assert (len(fake.slabs), len(fake.launches)) == (2, 1) and not cuda._weights


class TestPrecisionOfCublas:
    """Sums in fp32, whatever the process permits, and what it permits afterwards."""

    matmul = torch.backends.cuda.matmul
    names = tuple(name for sums in expanded.fp32_sums.values() for name in sums.flags)

    def flags(self) -> list[Any]:
        return [getattr(self.matmul, name) for name in self.names if hasattr(self.matmul, name)]

    @pytest.fixture(autouse=True)
    def _keep(self):
        before = self.flags()
        yield
        for name, setting in zip(self.names, before, strict=False):
            setattr(self.matmul, name, setting)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("permitted", [False, True])
    def test_is_full_within_and_restored_after_an_error(self, dtype, permitted):
        for name in self.names:
            setattr(self.matmul, name, permitted)
        before = self.flags()
        with pytest.raises(KeyError), expanded.fp32_sums[dtype]:
            assert not any(getattr(self.matmul, name) for name in expanded.fp32_sums[dtype].flags)
            raise KeyError
        assert self.flags() == before == [permitted] * len(before)

    def test_rules_out_no_split_k_nor_permits_it_again(self):
        self.matmul.allow_fp16_reduced_precision_reduction = (False, False)
        with expanded.fp32_sums[torch.float16]:
            pass
        assert not self.matmul.allow_fp16_reduced_precision_reduction_split_k

    def test_is_restored_by_the_last_of_several_threads(self):
        before, first_in, second_out = self.flags(), threading.Event(), threading.Event()
        seen, sums = [], expanded.fp32_sums[torch.float16]

        def first():
            with sums:
                first_in.set()
                second_out.wait(10)
                seen.extend(getattr(self.matmul, name) for name in sums.flags)

        thread = threading.Thread(target=first)
        thread.start()
        first_in.wait(10)
        with sums:
            pass
        second_out.set()
        thread.join()
        assert seen == [False] * len(sums.flags) and self.flags() == before
