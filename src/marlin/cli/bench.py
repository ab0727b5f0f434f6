"""`marlin bench`: the benchmarks of a source checkout, with arguments passed on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import typer

from marlin.cli.common import note
from marlin.errors import UnsupportedError, message


def checkout() -> Path | None:
    """The root of the checkout that holds the benchmarks: the current directory, or the one this file is in."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "benchmarks" / "gemm.py").is_file():
            return root
    return None


def bench(context: typer.Context) -> None:
    """Run the GEMM benchmark of a source checkout; further arguments are passed to it.

    \b
    Examples:
      marlin bench
      marlin bench --help-benchmark
    """
    root = checkout()
    if root is None:
        fix = "Clone the repository and run it there."
        raise UnsupportedError(message("bench", "the benchmarks live in a source checkout", "none here", fix))
    sys.path.insert(0, str(root))
    if importlib.util.find_spec("benchmarks.gemm") is None:
        raise UnsupportedError(message("bench", "benchmarks must be importable", f"no benchmarks.gemm in {root}"))
    from benchmarks import gemm

    arguments = ["--help" if argument == "--help-benchmark" else argument for argument in context.args]
    note(f"benchmarks.gemm of {root}")
    code = gemm.main(arguments)
    if code:
        raise typer.Exit(int(code))
