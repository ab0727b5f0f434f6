"""Compile kernels ahead of time, many at once, with a table of what the assembler reports.

Owns the process pool (NVRTC compiles one text at a time in a process) and the verdict on a row: kernels must neither
spill nor need a stack, and wgmma must not be serialized. Needs no GPU. Knows no configuration: variants come in.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from marlin.errors import CompileError, message, require
from marlin.runtime import cache, compiler


class BuildVariant(Protocol):
    """What is needed of a `marlin.runtime.source.Variant`."""

    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def smem_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    def target(self, arch: str) -> str | None: ...
    def render(self) -> str: ...


@dataclass(frozen=True)
class BuildRow:
    """One kernel on one architecture.

    name: the kernel family; entry: the symbol; registers of a thread; spill_bytes, stack_bytes of a thread; smem_bytes
    of a block, dynamic; seconds of compilation; stored: the cache on disk has it now; error: the compiler's words.
    """

    name: str
    entry: str
    arch: str
    registers: int | None
    spill_bytes: int | None
    stack_bytes: int | None
    smem_bytes: int
    threads: int
    image_bytes: int
    seconds: float
    serialized_wgmma: tuple[str, ...] = ()
    stored: bool = False
    error: str | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Why continuous integration must refuse this kernel; empty when it may not."""
        if self.error is not None:
            return (self.error,)
        found = []
        if self.registers is None or self.spill_bytes is None or self.stack_bytes is None:
            found.append("the assembler reported no resources")
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.stack_bytes:
            found.append(f"needs a stack frame of {self.stack_bytes} bytes")
        return (*found, *self.serialized_wgmma)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and `problems`."""
        return {**asdict(self), "serialized_wgmma": list(self.serialized_wgmma), "problems": list(self.problems)}


class _Task(NamedTuple):
    """Plain data, so that worker processes import nothing of the caller's."""

    text: str
    name: str
    entry: str
    arch: str
    smem_bytes: int
    threads: int
    options: tuple[str, ...]


def _compile(task: _Task) -> tuple[BuildRow, bytes]:
    """The row and the image of one task; a compile error becomes a row."""
    start = time.perf_counter()
    error: str | None = None
    cubin = compiler.Cubin(b"", "", None, None)
    try:
        cubin = compiler.compile_cubin(task.text, name=task.entry, arch=task.arch, options=task.options)
    except CompileError as raised:
        error = str(raised)
    row = BuildRow(
        name=task.name,
        entry=task.entry,
        arch=task.arch,
        registers=cubin.registers,
        spill_bytes=cubin.spill_bytes,
        stack_bytes=cubin.stack_bytes,
        smem_bytes=task.smem_bytes,
        threads=task.threads,
        image_bytes=len(cubin.image),
        seconds=time.perf_counter() - start,
        serialized_wgmma=cubin.serialized_wgmma,
        error=error,
    )
    return row, cubin.image


def _results(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[BuildRow, bytes]]:
    """In the order of tasks."""
    if jobs == 1 or len(tasks) < 2:
        yield from map(_compile, tasks)
        return
    # Why spawn: a process that has used CUDA or threads cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context)
    try:
        yield from pool.map(_compile, tasks)
    except BrokenExecutor as error:
        fix = "Memory may have run out: use fewer jobs."
        raise CompileError(message("build", "every compiler process must live", "one that died", fix)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def default_jobs() -> int:
    """One for each CPU that this process may use, at most 16: each takes the memory of an interpreter with torch."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def build_all(
    variants: Iterable[BuildVariant],
    archs: Sequence[str],
    jobs: int | None = None,
    *,
    store: bool = True,
    options: tuple[str, ...] = (),
    progress: Callable[[BuildRow], None] | None = None,
) -> list[BuildRow]:
    """Compile every variant for every architecture that it runs on, and keep the machine code in the cache.

    jobs: processes (1 compiles here; None takes `default_jobs`); store: whether to fill the cache; options: as
    `compiler.flags`; progress: called with each row, in order. Rows: variants in order, architectures within.
    A kernel that does not compile is a row with `error`, not an exception.
    Raises: ValueError (jobs, arch), UnsupportedError (no NVRTC, or one that does not know an architecture),
    CompileError (a compiler process died).
    """
    jobs = default_jobs() if jobs is None else jobs
    require(jobs >= 1, "build", "jobs must be at least 1", f"jobs={jobs}")
    for arch in archs:
        compiler.check_arch(arch)
    tasks = [
        _Task(text, variant.name, variant.entry, target, variant.smem_bytes, variant.threads, options)
        for variant in variants
        for text in (variant.render(),)
        for target in dict.fromkeys(filter(None, map(variant.target, archs)))
    ]
    rows = []
    for task, (row, image) in zip(tasks, _results(tasks, jobs), strict=True):
        if store and image:
            stored = cache.put_cubin(image, task.text, name=task.entry, arch=task.arch, options=options)
            row = BuildRow(**{**vars(row), "stored": stored})
        rows.append(row)
        if progress is not None:
            progress(row)
    return rows
