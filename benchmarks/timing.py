"""Timing by CUDA graph replay, with cold weights and peers interleaved.

Owns how a call is timed: a graph holds a sequence of calls that walks over copies of the weight whose total is more
than four times the level-2 cache, so that each call finds its weight in device memory; every round replays each peer's
graph once, so that clocks and temperature are shared; the figure is the median over rounds of replay time / calls.
Knows nothing of what a call computes, nor where: what runs in another process takes part as a `Recorded` of its own.
Where torch has no GPU, calls are timed by the host clock, so that the programs can be tried; nothing of it is recorded.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

# Call number i uses copy i of the weight.
Call = Callable[[int], object]

MIN_LAUNCHES, REPLAY_US = 20, 1200.0
MIN_ROUNDS, MAX_ROUNDS = 8, 60
# Of idling on the GPU before a replay that finds it empty: longer than the host takes to launch a graph.
_LEAD_CYCLES = 200_000


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile over replays."""

    us: float
    p10: float
    p90: float
    launches: int
    replays: int


class Recorded(Protocol):
    """A sequence of calls that can be replayed."""

    @property
    def launches(self) -> int:
        """Calls in one replay."""

    def queue(self) -> None:
        """Start a replay; need not wait for its end."""

    def collect(self) -> list[float]:
        """Microseconds per call of each replay queued since the last collect; waits for them."""

    def reset(self) -> None:
        """Free it."""


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
    if not torch.cuda.is_available():
        return max(_HostCalls(call, copies, 1).replay_us(), 1.0)
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


def lead_in() -> None:
    """Keep an idle GPU busy for a moment, so that the replay queued next is not timed from before its launch."""
    if torch.cuda.is_available():
        torch.cuda._sleep(_LEAD_CYCLES)


class _Graph:
    """Replays of a CUDA graph, timed by events."""

    def __init__(self, graph: torch.cuda.CUDAGraph, launches: int) -> None:
        self._graph, self.launches = graph, launches
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def queue(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        self._events.append((start, end))

    def collect(self) -> list[float]:
        torch.cuda.synchronize()
        found = [start.elapsed_time(end) * 1e3 / self.launches for start, end in self._events]
        self._events.clear()
        return found

    def reset(self) -> None:
        self._graph.reset()


class _HostCalls:
    """The same on the CPU, by the host clock."""

    def __init__(self, call: Call, copies: int, launches: int) -> None:
        self._call, self._copies, self.launches = call, copies, launches
        self._times: list[float] = []

    def replay_us(self) -> float:
        began = time.perf_counter()
        for i in range(self.launches):
            self._call(i % self._copies)
        return (time.perf_counter() - began) * 1e6 / self.launches

    def queue(self) -> None:
        self._times.append(self.replay_us())

    def collect(self) -> list[float]:
        found, self._times = self._times, []
        return found

    def reset(self) -> None:
        self._times.clear()


def record(call: Call, copies: int) -> Recorded:
    """A graph sized by a first, short one: eager launches are too slow to judge short calls by."""
    launches = launches_for(copies, estimate_us(call, copies))
    if not torch.cuda.is_available():
        return _HostCalls(call, copies, launches)
    graph = capture(call, copies, launches)
    graph.replay()
    first = _Graph(graph, launches)
    first.queue()
    wanted = launches_for(copies, max(first.collect()[0], 1.0))
    if wanted <= 1.5 * launches and launches <= 1.5 * wanted:
        return first
    first.reset()
    return _Graph(capture(call, copies, wanted), wanted)


class _Interleaved:
    """What takes part in one measurement; what fails leaves it and is reported."""

    def __init__(self, failed: Callable[[str, Exception], None] | None) -> None:
        self._failed = failed
        self.parts: dict[str, Recorded] = {}
        self.samples: dict[str, list[float]] = {}

    def attempt(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            self.parts.pop(name, None)
            if self._failed is None:
                raise
            self._failed(name, error)

    def add(self, name: str, make: Callable[[], Recorded]) -> None:
        self.parts[name] = make()

    def collect(self, name: str) -> None:
        self.samples.setdefault(name, []).extend(self.parts[name].collect())

    def round(self) -> None:
        lead_in()
        for name, part in list(self.parts.items()):
            self.attempt(name, part.queue)


def time_interleaved(
    calls: Mapping[str, tuple[Call, int]],
    budget_ms: float = 40.0,
    failed: Callable[[str, Exception], None] | None = None,
    others: Mapping[str, Callable[[], Recorded]] | None = None,
) -> dict[str, Timing]:
    """Time several calls against each other.

    calls: name to (call, copies); each is checked by the caller beforehand. others: name to what records it elsewhere.
    budget_ms: device time for each. failed: told of one that cannot be captured or replayed, which is then left out;
    without it the error is raised.
    """
    run = _Interleaved(failed)
    makers: dict[str, Callable[[], Recorded]] = {name: functools.partial(record, *call) for name, call in calls.items()}
    for name, make in {**makers, **(others or {})}.items():
        run.attempt(name, functools.partial(run.add, name, make))
    run.round()
    longest = 0.0
    for name, part in list(run.parts.items()):
        run.attempt(name, functools.partial(run.collect, name))
        longest = max([longest, *(us * part.launches / 1e3 for us in run.samples.pop(name, []))])
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget_ms / max(longest, 1e-3))))
    for _ in range(rounds):
        run.round()
    timings = {}
    for name, part in list(run.parts.items()):
        run.attempt(name, functools.partial(run.collect, name))
        if name in run.parts:
            timings[name] = Timing(*percentiles(run.samples[name]), part.launches, rounds)
        part.reset()
    return timings
