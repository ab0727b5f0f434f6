"""The operators on the GPU: values, inputs of any layout, streams, graphs, tracing, gradients, refusals, host time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from marlin import ops, runtime
from marlin.formats.layouts import PackedWeight, pack, unpack
from marlin.nn import SparseLinear
from marlin.ops import scratch
from marlin.testing import tolerance
from marlin.testing.cases import KINDS, Case, cases, random_act, random_weight

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# One column of tiles and a long K: the plan splits K, so launches share parts and tickets.
SPLIT_N, SPLIT_K = 64, 16384


def make_packed(kind: str, n: int = 72, k: int = 96, group_size: int = 32, seed: int = 0) -> PackedWeight:
    return pack(random_weight(n, k, group_size, kind, device=DEVICE, seed=seed))


def make_split(kind: str = "w4a16_sp24", m: int = 16, seed: int = 0) -> PackedWeight:
    problem = runtime.Problem(m, SPLIT_N, SPLIT_K, 128, "float16", kind)
    assert runtime.plan(problem, torch.cuda.current_device()).num_tickets, "the case must need split-K memory"
    return make_packed(kind, SPLIT_N, SPLIT_K, 128, seed)


def acts(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return random_act(m, k, device=DEVICE, seed=seed)


def arguments(packed: PackedWeight, act: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[object, ...]:
    tensors = [t for t in (packed.codes, packed.meta, packed.scales) if t is not None]
    return (act, *tensors, bias, packed.n, packed.group_size)


@pytest.mark.parametrize("case", cases(max_macs=1 << 33), ids=lambda case: case.id)
def test_operator_is_within_the_bound_and_overwrites_a_poisoned_output(case: Case):
    act, weight, bias = case.inputs(DEVICE)
    packed = pack(weight)
    guarded = torch.full((case.m + 2, case.n), torch.nan, dtype=case.dtype, device=DEVICE)
    ops.linear_out(act, packed, guarded[1:-1], bias)
    tolerance.check(guarded[1:-1], act, weight, bias, name=case.id)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    assert torch.equal(ops.linear(act, packed, bias), guarded[1:-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_activations_give_back_the_weight_bit_for_bit(kind, group_size, dtype):
    packed = pack(random_weight(200, 384, group_size, kind, dtype=dtype, device=DEVICE))
    out = ops.linear(torch.eye(384, dtype=dtype, device=DEVICE), packed)
    assert torch.equal(out.T, unpack(packed).to_dense(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_beyond_n_and_k_change_nothing(kind):
    wide = make_packed(kind, 128, 128)
    scales = wide.scales[:, :3].contiguous()
    cut = PackedWeight(kind, wide.codes, wide.meta, scales, 72, 96, 32)
    act = acts(17, 96)
    tolerance.check(ops.linear(act, cut), act, unpack(cut))
    assert torch.equal(ops.linear(act, cut), ops.linear(act, pack(unpack(cut))))


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows-apart": lambda a: torch.cat([a, a], 1)[:, : a.shape[1]],
    "3d-rows-apart": lambda a: torch.cat([a, a], 1).view(2, 3, -1)[..., : a.shape[1]],
    "transposed": lambda a: a.T.contiguous().T,
    "odd-stride": lambda a: torch.cat([a, a[:, :1]], 1)[:, : a.shape[1]],
    "misaligned": lambda a: torch.cat([a[0, :1], a.flatten()])[1:].view_as(a),
    "expanded": lambda a: a[:1].expand_as(a),
    "every-second-row": lambda a: a[::2],
    "vector": lambda a: a[0],
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("kind", KINDS)
def test_operator_takes_act_of_any_layout(kind, name):
    packed, act = make_packed(kind), STRIDED[name](acts(6, 96))
    out = ops.linear(act, packed)
    assert out.is_contiguous() and torch.equal(
        out, ops.linear(act.clone(memory_format=torch.contiguous_format), packed)
    )
    tolerance.check(out, act, unpack(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_takes_no_rows_and_more_rows_than_one_launch(kind):
    packed = make_packed(kind, 8, 32)
    assert ops.linear(acts(0, 32), packed).shape == (0, 8)
    act = acts(65536 + 5, 32)
    tolerance.check(ops.linear(act, packed), act, unpack(packed))


@pytest.mark.parametrize("offset", [1, 4])
def test_operator_takes_misaligned_bias_and_output(offset):
    packed, act = make_packed("w4a16_sp24"), acts(5, 96)
    bias = torch.randn(72 + offset, device=DEVICE).half()[offset:]
    out = torch.full((5 * 72 + offset,), torch.nan, device=DEVICE, dtype=torch.float16)[offset:].view(5, 72)
    ops.linear_out(act, packed, out, bias)
    tolerance.check(out, act, unpack(packed), bias)


@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_same_from_run_to_run_and_tickets_end_at_zero(kind, m):
    packed, act = make_split(kind, min(m, 16)), acts(m, SPLIT_K)
    first = ops.linear(act, packed)
    assert all(torch.equal(ops.linear(act, packed), first) for _ in range(50))
    torch.cuda.synchronize()
    assert scratch._of_stream
    assert not any(memory._tickets.any() for memory in scratch._of_stream.values())


def test_streams_do_not_disturb_each_other():
    weights = [make_split(seed=seed) for seed in range(2)]
    inputs = [acts(16, SPLIT_K, seed) for seed in range(2)]
    expected = [ops.linear(act, packed) for act, packed in zip(inputs, weights, strict=True)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], ([], [])
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(ops.linear(inputs[i], weights[i]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i in range(2) for out in results[i])


def test_threads_launch_on_their_own_streams():
    packed, act = make_split(), acts(16, SPLIT_K)
    expected, results = ops.linear(act, packed), []
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [ops.linear(act, packed) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            results.extend(torch.equal(out, expected) for out in outs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200 and all(results)


def capture(act: torch.Tensor, weights: list[PackedWeight]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of one product per weight; the first calls are made outside, as CUDA graphs demand."""
    for packed in weights:
        ops.linear(act, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [ops.linear(act, packed) for packed in weights]
    return graph, outs


def test_graph_replays_with_new_inputs():
    weights = [make_split(kind) for kind in KINDS] + [make_packed(kind, 200, SPLIT_K, 128) for kind in KINDS]
    act = acts(16, SPLIT_K)
    graph, outs = capture(act, weights)
    for seed in range(5):
        act.copy_(acts(16, SPLIT_K, seed))
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, ops.linear(act, w)) for out, w in zip(outs, weights, strict=True))


def test_graphs_replay_at_once_with_each_other_and_with_eager_calls():
    weights = [make_split(seed=seed) for seed in range(3)]
    inputs = [acts(16, SPLIT_K, seed) for seed in range(3)]
    expected = [ops.linear(act, packed) for act, packed in zip(inputs, weights, strict=True)]
    graphs = [capture(inputs[i], [weights[i]] * 20) for i in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [ops.linear(inputs[2], weights[2]) for _ in range(20)]
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected[2]) for out in eager)
        assert all(torch.equal(out, expected[i]) for i in range(2) for out in graphs[i][1])


def test_graph_captures_side_streams():
    weights = [make_split(seed=seed) for seed in range(2)]
    act = acts(16, SPLIT_K)
    expected = [ops.linear(act, packed) for packed in weights]
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = ops.linear(act, weights[1])
        first = ops.linear(act, weights[0])
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_operator_compiles_whole_with_dynamic_m(kind):
    layer = SparseLinear.from_weight(random_weight(256, 512, 128, kind, device=DEVICE))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 17, 64):
        assert torch.equal(compiled(acts(m, 512)), layer(acts(m, 512)))


def test_operator_compiles_into_cuda_graphs():
    packed, other = make_split(), make_packed("w4a16_dense", SPLIT_N, SPLIT_K, 128)

    def run(act: torch.Tensor) -> torch.Tensor:
        return torch.cat([ops.linear(act, packed), ops.linear(act, other)])

    compiled = torch.compile(run, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            act = acts(16, SPLIT_K, seed)
            assert torch.equal(compiled(act).clone(), run(act))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_passes_opcheck(kind):
    packed, op = make_packed(kind), getattr(torch.ops.marlin, kind).default
    bias = torch.randn(72, device=DEVICE).half()
    torch.library.opcheck(op, arguments(packed, acts(5, 96).requires_grad_(), bias.clone().requires_grad_()))
    out = torch.empty(5, 72, dtype=torch.float16, device=DEVICE)
    out_op = getattr(torch.ops.marlin, f"{kind}_out").default
    torch.library.opcheck(out_op, (*arguments(packed, acts(5, 96), bias), out))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_act_and_bias(kind):
    packed, act = make_packed(kind, 200, 96), acts(33, 96).requires_grad_()
    bias = torch.randn(200, device=DEVICE).half().requires_grad_()
    grad = acts(33, 200, seed=3)
    ops.linear(act, packed, bias).backward(grad)
    dense = unpack(packed).to_dense(torch.float32)
    assert torch.allclose(act.grad.float(), grad.float() @ dense, atol=2e-3, rtol=2e-3)
    assert torch.allclose(bias.grad.float(), grad.float().sum(0), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operator_gives_the_same_in_every_grad_mode(mode):
    packed, act = make_split(), acts(16, SPLIT_K)
    with mode():
        first = ops.linear(act, packed)
    assert torch.equal(ops.linear(act, packed), first)
    with mode():
        assert torch.equal(ops.linear(act.clone(), packed), first)


def test_operator_refuses_float32_and_mixed_devices_before_any_launch():
    packed = make_packed("w4a16_sp24")
    with pytest.raises(TypeError) as caught:
        ops.linear(acts(5, 96).float(), packed)
    assert str(caught.value) == (
        "w4a16_sp24: act must be torch.float16 or torch.bfloat16; got torch.float32. Cast it with .to(dtype)."
    )
    with pytest.raises(ValueError) as caught:
        ops.linear(acts(5, 96).cpu(), packed)
    assert str(caught.value) == (
        "w4a16_sp24: all tensors must be on one device; got act on cpu, codes on cuda:0, meta on cuda:0, "
        "scales on cuda:0. Move the input or the layer."
    )


def test_operator_runs_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight = random_weight(SPLIT_N, SPLIT_K, 128, device="cuda:1")
    act = random_act(16, SPLIT_K, device="cuda:1")
    with torch.cuda.device(0):
        out = ops.linear(act, pack(weight))
    tolerance.check(out, act, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_moves_to_the_gpu_and_agrees_with_the_cpu(kind):
    layer = SparseLinear.from_weight(random_weight(200, 576, 64, kind), torch.randn(200).half())
    act = random_act(9, 576)
    reference = layer(act)
    out = layer.to(DEVICE)(act.to(DEVICE))
    tolerance.check(out, act.to(DEVICE), layer.to_weight(), layer.bias)
    assert torch.allclose(out.cpu().float(), reference.float(), atol=2e-3, rtol=2e-3)


def test_describe_names_the_kernel():
    text = ops.describe("w4a16_sp24", 16, 4096, 4096, 128, torch.float16, DEVICE)
    assert text.split()[0].endswith("_w4a16_sp24")


def test_host_time_of_an_eager_call_is_printed(capsys):
    layer = SparseLinear.from_weight(random_weight(4096, 4096, 128, device=DEVICE))
    act = acts(16, 4096)
    dense = torch.randn(4096, 4096, device=DEVICE).half()
    op, args = torch.ops.marlin.w4a16_sp24.default, arguments(layer.packed, act)
    lines = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            calls = {
                "SparseLinear": lambda: layer(act),
                "torch.ops": lambda: op(*args),
                "F.linear": lambda: torch.nn.functional.linear(act, dense),
            }
            times = {name: host_us(call) for name, call in calls.items()}
        lines.append(f"{mode.__name__}: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()))
        assert times["SparseLinear"] < 200
    with capsys.disabled():
        print("\nhost time of an eager call, " + "; ".join(lines))


def host_us(call: Callable[[], object], rounds: int = 20, per_round: int = 100) -> float:
    """Median host microseconds of a call; rounds are short enough that the launch queue never fills."""
    call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(per_round):
            call()
        times.append((time.perf_counter() - start) / per_round * 1e6)
    return sorted(times)[rounds // 2]
