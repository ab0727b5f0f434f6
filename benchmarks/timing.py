"""Timing by CUDA graph replay, with cold weights and peers interleaved.

Owns how a call is timed: a graph holds a sequence of calls that walks over copies of the weight whose total is more
than four times the level-2 cache, so that each call finds its weight in device memory; every round replays each peer's
graph once, so that clocks and temperature are shared; the figure is the median over rounds of replay time / calls.
Knows nothing of what a call computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Call number i uses copy i of the weight.
Call = Callable[[int], object]

MIN_LAUNCHES, REPLAY_US = 20, 1200.0
MIN_ROUNDS, MAX_ROUNDS = 8, 60


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile over replays."""

    us: float
    p10: float
    p90: float
    launches: int
    replays: int


def copies_for(bytes_each: int, l2_bytes: int) -> int:
    """Copies of a weight whose total exceeds four times the level-2 cache; at least 2."""
    return max(2, 4 * l2_bytes // max(bytes_each, 1) + 1)


def launches_for(copies: int, call_us: float) -> int:
    """Calls in one graph: whole walks over the copies, about REPLAY_US long, at least MIN_LAUNCHES.

    Calls longer than a tenth of the replay time are cut to four at least: each of them moves or computes so much
    that the state of the cache before it is nothing.
    """
    if call_us > REPLAY_US / 10:
        return max(4, min(MIN_LAUNCHES, math.ceil(2 * REPLAY_US / call_us)))
    walks = max(math.ceil(MIN_LAUNCHES / copies), round(REPLAY_US / (call_us * copies)), 1)
    return walks * copies


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """(median, p10, p90), nearest rank below."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    p10, median, p90 = (ordered[int(last * share)] for share in (0.1, 0.5, 0.9))
    return median, p10, p90


def estimate_us(call: Call, copies: int, calls: int = 6) -> float:
    """Rough time of one call, launched eagerly; also the warm-up that compiles and loads. At least 1."""
    for i in range(2):
        call(i % copies)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(calls):
        call(i % copies)
    end.record()
    end.synchronize()
    return float(max(start.elapsed_time(end) * 1e3 / calls, 1.0))


@functools.cache
def _capture_stream(device_index: int) -> torch.cuda.Stream:
    # Why one for all captures: libraries keep a workspace for every stream that they have seen.
    return torch.cuda.Stream(device_index)


def capture(call: Call, copies: int, launches: int) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls that walk over the copies."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
        call(0)
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(launches):
                call(i % copies)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _graph(call: Call, copies: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph sized by a first, short one: eager launches are too slow to judge short calls by."""
    launches = launches_for(copies, estimate_us(call, copies))
    first = capture(call, copies, launches)
    first.replay()
    exact = _replay_ms(first) * 1e3 / launches
    wanted = launches_for(copies, max(exact, 1.0))
    if wanted <= 1.5 * launches and launches <= 1.5 * wanted:
        return first, launches
    first.reset()
    return capture(call, copies, wanted), wanted


def time_interleaved(
    calls: Mapping[str, tuple[Call, int]],
    budget_ms: float = 40.0,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time several calls against each other.

    calls: name to (call, copies); each is checked by the caller beforehand.
    budget_ms: device time for each. failed: told of a call that cannot be captured, which is then left out; without
    it the error is raised.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, (call, copies) in calls.items():
        try:
            graphs[name] = _graph(call, copies)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
    if not graphs:
        return {}
    longest = max(_replay_ms(graph) for graph, _ in graphs.values())
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget_ms / longest)))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, _launches) in graphs.items():
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            graph.replay()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    timings = {}
    for name, (graph, launches) in graphs.items():
        samples = [start.elapsed_time(end) * 1e3 / launches for start, end in events[name]]
        timings[name] = Timing(*percentiles(samples), launches, rounds)
        graph.reset()
    return timings
