"""The shortest way of an eager call on the GPU: the same results as by torch, and when it is not taken."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from marlin import ops
from marlin.formats.layouts import pack
from marlin.nn import SparseLinear
from marlin.ops import cuda
from marlin.testing import tolerance
from marlin.testing.cases import KINDS, random_act, random_weight

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def make_layer(kind: str = "w4a16_sp24", n: int = 200, k: int = 1152, seed: int = 0) -> SparseLinear:
    return SparseLinear.from_weight(random_weight(n, k, 128, kind, device=DEVICE, seed=seed))


def through_dispatcher(layer: SparseLinear, act: torch.Tensor) -> torch.Tensor:
    packed = layer.packed
    tensors = [t for t in (packed.codes, packed.meta, packed.scales) if t is not None]
    return getattr(torch.ops.marlin, layer.kind).default(act, *tensors, layer.bias, packed.n, packed.group_size)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_gives_what_the_dispatcher_gives(kind: str, mode: type) -> None:
    layer = make_layer(kind)
    with mode():
        for shape in ((1,), (17,), (2, 3, 5), (0,), (300,)):
            act = random_act(max(torch.Size(shape).numel(), 1), 1152, device=DEVICE)[: torch.Size(shape).numel()]
            act = act.view(*shape, 1152)
            for _ in range(3):
                out = layer(act)
                assert out.is_inference() == torch.is_inference_mode_enabled() and not out.requires_grad
                assert out.shape == (*shape, 200) and out.is_contiguous()
                assert torch.equal(out, through_dispatcher(layer, act))


def test_layer_is_captured_and_replayed_with_new_inputs() -> None:
    layer, act = make_layer(), random_act(16, 1152, device=DEVICE)
    with torch.no_grad():
        layer(act)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(act)
        for seed in range(3):
            act.copy_(random_act(16, 1152, device=DEVICE, seed=seed))
            graph.replay()
            assert torch.equal(out, layer(act))


def test_layers_in_memory_of_earlier_ones_are_their_own() -> None:
    act = random_act(16, 1152, device=DEVICE)
    with torch.inference_mode():
        for seed in range(8):
            layer = make_layer(seed=seed)
            tolerance.check(layer(act), act, layer.to_weight(), name=f"layer {seed}")
            other = pack(random_weight(200, 1152, 128, device=DEVICE, seed=100 + seed))
            layer.codes.copy_(other.codes), layer.meta.copy_(other.meta), layer.scales.copy_(other.scales)
            tolerance.check(layer(act), act, layer.to_weight(), name=f"layer {seed}, filled again")
            del layer, other
            gc.collect()


def test_weights_that_moved_are_found_where_they_are() -> None:
    layer, act = make_layer(), random_act(16, 1152, device=DEVICE)
    with torch.no_grad():
        expected = layer(act)
        layer.to("cpu")
        assert torch.allclose(layer(act.cpu()).float(), expected.cpu().float(), atol=2e-2)
        layer.to(DEVICE)
        assert torch.equal(layer(act), expected)
        assert torch.equal(layer.to(torch.bfloat16)(act.bfloat16()), through_dispatcher(layer, act.bfloat16()))


def test_profiler_and_modes_see_the_operator() -> None:
    layer, act = make_layer(), random_act(16, 1152, device=DEVICE)
    with torch.no_grad():
        expected = layer(act)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(layer(act), expected)
        assert "marlin::w4a16_sp24" in {event.key for event in profile.key_averages()}
        with torch.device(DEVICE):
            assert torch.equal(layer(act), expected)
        stacked = torch.stack([act, -act])
        assert ops.is_plain(act) and not ops.is_plain(torch._neg_view(act))
        assert torch.equal(ops.linear(torch._neg_view(act), layer.packed), layer(-act))
        assert torch.equal(layer(stacked)[0], expected)


def test_gradients_reach_activations_through_the_layer() -> None:
    layer, act = make_layer(), random_act(16, 1152, device=DEVICE).requires_grad_()
    layer(act).float().sum().backward()
    dense = layer.to_weight().to_dense(torch.float32)
    assert act.grad is not None and torch.allclose(act.grad.float(), dense.sum(0).expand(16, -1), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layer_runs_on_the_gpu_of_its_tensors() -> None:
    layer, act = make_layer(), random_act(16, 1152, device=DEVICE)
    with torch.no_grad():
        expected = layer(act)
        there = layer.to("cuda:1")
        assert torch.cuda.current_device() == 0
        assert torch.equal(there(act.to("cuda:1")).to(DEVICE), expected)


def test_remembered_weights_hold_no_memory() -> None:
    def run_once() -> tuple[int, int]:
        layer, act = make_layer(n=4096, k=4096), random_act(1, 4096, device=DEVICE)
        with torch.no_grad():
            layer(act)
        torch.cuda.synchronize()
        del layer, act
        gc.collect()
        return torch.cuda.memory_allocated(), len(cuda._weights)

    first = run_once()  # which keeps what splitting K needs
    assert all(run_once() == first for _ in range(3))


def test_launches_that_come_again_see_new_values_on_every_stream_and_thread() -> None:
    layer, act = make_layer(n=4096, k=4096), random_act(1, 4096, device=DEVICE)
    faults: list[str] = []

    def work(stream: torch.cuda.Stream, name: str) -> None:
        own = torch.empty_like(act)
        with torch.no_grad(), torch.cuda.stream(stream):
            for seed in range(8):
                own.copy_(random_act(1, 4096, device=DEVICE, seed=seed))
                if not torch.equal(layer(own), through_dispatcher(layer, own)):
                    faults.append(f"{name}, call {seed}")

    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for index, stream in enumerate(streams[:2]):
        work(stream, f"stream {index}")
    threads = [threading.Thread(target=work, args=(stream, "thread")) for stream in streams[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    weight = cuda._weights[id(layer.codes)]
    assert any(again is not None for again in weight.again.values()), "no launch was packed"
