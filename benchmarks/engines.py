"""Processes that run vLLM: their environment, their start, and what they print as they measure.

Owns how the plugin of a checkout that is not installed is found, and that an engine that fails or hangs costs the
others nothing. What is measured belongs to `benchmarks.serving`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import records

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def case_environment(case: str, entry_points: str, tp: int) -> dict[str, str]:
    """Environment of one engine. The plugin is loaded where it is measured, and nowhere else."""
    paths = [entry_points, str(records.ROOT / "src"), str(records.ROOT), os.environ.get("PYTHONPATH", "")]
    plugin = {"VLLM_PLUGINS": "sparse_marlin" if "marlin" in case else ""}
    dense = {"MARLIN_VLLM_DENSE": "1"} if case.endswith("marlin kernel") else {}
    norms = {"MARLIN_VLLM_ROWWISE": "0"} if case.endswith("vLLM norms") else {}
    single = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tp == 1 else {}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **_ENVIRONMENT, **plugin, **dense, **norms, **single, **own}


def write_entry_points(directory: pathlib.Path) -> None:
    """Metadata by which vLLM finds the plugin of a checkout that is not installed."""
    info = directory / "sparse_marlin-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparse-marlin\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nsparse_marlin = marlin.integrations.vllm:plugin\n")


class Engine:
    """The process of one engine. It imports vLLM when made, and begins with the GPU when told to."""

    def __init__(self, case: str, args: argparse.Namespace) -> None:
        self.case = case
        self._log = open(args.log, "a") if args.log else None  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory()
        write_entry_points(pathlib.Path(self._folder.name))
        words = [sys.executable, "-m", "benchmarks.serving", "--case", case, *args.words]
        self._process = subprocess.Popen(
            words,
            cwd=records.ROOT,
            env=case_environment(case, self._folder.name, args.tp),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def measure(self, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """("ROW" or "PROFILE", what was measured) as it comes; the process is ended after `limit` seconds."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(max(limit, 1.0), process.kill)
        timer.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        tail: collections.deque[str] = collections.deque(maxlen=60)
        for line in process.stdout:
            kind, _, text = line.partition(" ")
            if kind in ("ROW", "PROFILE"):
                yield kind, json.loads(text)
                continue
            tail.append(line)
            if self._log is not None:
                self._log.write(line)
                self._log.flush()
            if line.startswith(self.case):
                print(line, end="", flush=True)
        timer.cancel()
        if process.wait():
            print(f"{self.case}: ended with status {process.returncode}\n{''.join(tail)[-5000:]}", flush=True)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
        if self._log is not None:
            self._log.close()


def measure_all(cases: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the engines give, one after another, each in at most 60% of the seconds that are left, the last in all."""
    end = time.monotonic() + args.seconds
    with contextlib.ExitStack() as stack:
        # Why all at once: importing takes longer than starting, and needs no GPU.
        engines = [stack.enter_context(contextlib.closing(Engine(case, args))) for case in cases]
        for index, engine in enumerate(engines):
            left = end - time.monotonic()
            yield from engine.measure(left if index + 1 == len(engines) else 0.6 * left)
            engine.close()
