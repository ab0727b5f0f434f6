"""A peer in a process of its own, timed in turn with what runs here.

Owns the process, the messages, and what a death or a long silence of it means: the peer is absent, with the reason, and
the benchmark goes on. Needed for libraries that do not stand each other in one process, kind to this one for all that
bring a runtime along. The process waits while others are measured, and they wait while it replays; a replay is timed
by the same events on the GPU, after a moment of idling that hides the launch. Knows nothing of any peer.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import timing
from benchmarks.candidates import AbsentError, Factory, Prepared, Setting

# Seconds without an answer after which a process is given up: compiling and tuning for one shape.
ANSWER_S = 30.0


@dataclass(frozen=True)
class Peer:
    """`module:function` of a `Factory`, and what must hold before a process is worth starting (raises AbsentError)."""

    factory: str
    present: Callable[[], object]


class _Served:
    """The other side: one weight at a time, one recording at a time."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._setting: Setting | None = None
        self._built: Prepared | None = None
        self._recorded: timing.Recorded | None = None

    def build(self, setting: Setting) -> tuple[str, str, int]:
        self._built = self._recorded = None
        if setting.device.type == "cuda":
            torch.cuda.set_device(setting.device)
            torch.cuda.empty_cache()
        self._setting, self._built = setting, self._factory(setting)
        return self._built.impl, self._built.op, self._built.copies

    def record(self, m: int) -> int:
        assert self._setting is not None and self._built is not None
        setting, built = self._setting, self._built
        act = setting.random_act(m)
        out = torch.empty(m, setting.n, dtype=setting.dtype, device=setting.device)
        self._recorded = timing.record(lambda i: built.call(i, act, out), built.copies)
        return self._recorded.launches

    def replay(self) -> float:
        assert self._recorded is not None
        timing.lead_in()
        self._recorded.queue()
        return self._recorded.collect()[0]

    def reset(self) -> None:
        if self._recorded is not None:
            self._recorded.reset()
        self._recorded = None


def serve(pipe: Connection, factory: str) -> None:
    """Answer (name, arguments) with ("ok", value), ("absent", reason) or ("error", reason) until the pipe closes."""
    # Why: what others print would stand in the middle of the table; descriptor 1, since libraries print there too.
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    served: _Served | None = None
    with torch.inference_mode(), contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            try:
                if served is None:
                    module, _, function = factory.partition(":")
                    served = _Served(getattr(importlib.import_module(module), function))
                pipe.send(("ok", getattr(served, name)(*arguments)))
            except AbsentError as reason:
                pipe.send(("absent", str(reason)))
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0][:200]
                pipe.send(("error", f"{type(error).__name__}: {first}"))


class Process:
    """This side: starts the process on first use, and again after it died.

    allowance_s: seconds that preparing (compiling, tuning, capturing) may take over the whole run.
    """

    def __init__(self, peer: Peer, allowance_s: float) -> None:
        self._peer, self._left_s, self._allowance_s = peer, allowance_s, allowance_s
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> None:
        """Start it without waiting. Raises: AbsentError."""
        self._peer.present()
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._peer.factory), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the other side answers. Raises: AbsentError."""
        try:
            self._pipe.send((name, arguments))
            if not self._pipe.poll(ANSWER_S):
                self.stop()
                raise AbsentError(f"no answer within {ANSWER_S:.0f} s")
            status, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            code = self._process.exitcode
            self.stop()
            raise AbsentError(f"its process ended with status {code}") from error
        if status != "ok":
            raise AbsentError(value)
        return value

    def prepare(self, name: str, *arguments: Any) -> Any:
        """`ask`, on the allowance."""
        if self._left_s <= 0:
            fix = "raise --peer-seconds"
            raise AbsentError(f"preparing it took more than the {self._allowance_s:.0f} s allowed; {fix}")
        began = time.monotonic()
        try:
            return self.ask(name, *arguments)
        finally:
            self._left_s -= time.monotonic() - began

    def build(self, setting: Setting) -> Prepared:
        """As a `Factory`. Raises: AbsentError."""
        self.start()
        impl, op, copies = self.prepare("build", setting)
        return Prepared(impl, op, copies, call=_not_here, record=lambda m: Elsewhere(self, m))

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.terminate()
            self._process.join(timeout=10)
        self._process = None


def _not_here(i: int, act: torch.Tensor, out: torch.Tensor) -> None:
    raise AssertionError("this implementation runs in another process")


class Elsewhere:
    """A recording in the other process. While it replays, nothing else does."""

    def __init__(self, process: Process, m: int) -> None:
        self._process = process
        self.launches = int(process.prepare("record", m))
        self._times: list[float] = []

    def queue(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(float(self._process.ask("replay")))

    def collect(self) -> list[float]:
        found, self._times = self._times, []
        return found

    def reset(self) -> None:
        # Why not ask: resetting comes after the last replay, where a death changes no result.
        with contextlib.suppress(AbsentError):
            self._process.ask("reset")
