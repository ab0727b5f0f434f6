"""Split-K memory of kernels: fp32 parts of tiles, and int32 tickets that are zero before each launch and after it.

Owns where that memory lives and who may share it. Launches on one stream run one after the other and share; a CUDA
graph may be replayed on any stream, so each capture has tickets of its own and takes its parts from its own pool.
Knows sizes only, not what is in a plan.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MAX_PARTS_BYTES = 64 << 20
_ARENA_TICKETS = 1 << 18
_MIN_TICKETS = 1 << 10
_MAX_CAPTURES = 256


def _allocate(num_elements: int, dtype: torch.dtype, device: torch.device, capturing: bool = False) -> Tensor:
    """Memory that outlives the call, from torch's ordinary pool whatever mode or pool the caller is in.

    Why a thread: the pools of graph captures, of `torch.compile(mode="reduce-overhead")` and of
    `torch.cuda.use_mem_pool`, and inference mode, belong to a thread or a stream, and kept memory must not be theirs.
    """

    def work() -> Tensor:
        if device.type != "cuda":
            return torch.empty(num_elements, dtype=dtype, device=device)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                memory = torch.empty(num_elements, dtype=dtype, device=device)
            # Why: a block that is handed out again may still be in use by earlier work of its stream. Nothing may
            # wait during a capture; tickets are allocated long before the graph runs.
            if not capturing:
                stream.synchronize()
        return memory

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


class _TicketArena:
    """Tickets of one device in slots that are never taken back, since a graph may be replayed at any time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.int32)

    def slot(self, num_tickets: int, capturing: bool) -> Tensor:
        """At least num_tickets zeros (4 KiB for up to 1024), zeroed on the current stream, captured or not."""
        size = 1 << (max(num_tickets, _MIN_TICKETS) - 1).bit_length()
        with self._lock:
            if self._free.numel() < size:
                self._free = _allocate(max(size, _ARENA_TICKETS), torch.int32, self._device, capturing)
            slot, self._free = self._free[:size], self._free[size:]
        return slot.zero_()


class SplitKMemory:
    """Parts and tickets of one stream, or of a stream within a capture. Hold `lock` from `reserve` to the launch."""

    def __init__(self, arena: _TicketArena, device: torch.device, captured: bool) -> None:
        self.lock = threading.Lock()
        self._arena, self._device, self._captured = arena, device, captured
        self._parts = self._tickets = torch.empty(0, dtype=torch.int32)
        self._num_tickets = self._num_bytes = 0

    def reserve(self, num_bytes: int, num_tickets: int) -> tuple[Tensor, Tensor]:
        """(parts of at least num_bytes, at least num_tickets zero tickets); keep both until the launch is queued."""
        if num_tickets > self._num_tickets:
            self._tickets = self._arena.slot(num_tickets, self._captured)
            self._num_tickets = self._tickets.numel()
        if self._captured:
            # Why not kept: memory of a capture's pool that is still held when the capture ends looks like a leak.
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device), self._tickets
        if num_bytes > self._num_bytes:
            assert num_bytes <= MAX_PARTS_BYTES, f"a plan asked for {num_bytes} bytes of parts"
            if self._num_bytes and self._device.type == "cuda":
                self._parts.record_stream(torch.cuda.current_stream(self._device))
            self._parts = _allocate(1 << (num_bytes - 1).bit_length(), torch.uint8, self._device)
            self._num_bytes = self._parts.numel()
        return self._parts, self._tickets


_arenas: dict[torch.device, _TicketArena] = {}
_of_stream: dict[tuple[torch.device, int], SplitKMemory] = {}
_of_capture: dict[tuple[torch.device, int, int], SplitKMemory] = {}


def split_k_memory(device: torch.device, stream: int, capture: int) -> SplitKMemory:
    """The memory for a launch on `stream`, the current stream of `device`; capture numbers its capture, 0 for none."""
    if capture == 0:
        memory = _of_stream.get((device, stream))
        if memory is None:
            memory = _of_stream.setdefault((device, stream), SplitKMemory(_arena(device), device, captured=False))
        return memory
    key = (device, stream, capture)
    memory = _of_capture.get(key)
    if memory is None:
        if len(_of_capture) >= _MAX_CAPTURES:
            _of_capture.clear()  # Why: most are of finished captures; one under way takes a new slot.
        memory = _of_capture.setdefault(key, SplitKMemory(_arena(device), device, captured=True))
    return memory


def _arena(device: torch.device) -> _TicketArena:
    return _arenas.setdefault(device, _TicketArena(device))
