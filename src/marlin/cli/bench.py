"""`marlin bench`: the benchmarks of a source checkout, with arguments passed on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from marlin.cli.common import EXIT_BAD_INPUT, Group, note
from marlin.errors import UnsupportedError, message

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Measure, from a source checkout: kernels against peers, a whole decoder, figures from the records.

    Each takes its own options: marlin bench gemm --help.

    \b
    Examples:
      marlin bench gemm --quick
      marlin bench decode --layers 8
      marlin bench figures
    """,
)
# Name to (module below `benchmarks`, what it does).
BENCHMARKS = {
    "gemm": ("gemm", "Every layer shape against cuBLAS and peers, checked first. About 200 s on one GPU."),
    "decode": ("decode", "A decoder of Llama-3.1-8B's shape, tokens per second and where the time goes. About 60 s."),
    "sustained": ("sustained", "Each model's layers back to back, with clocks and power. About 45 s a model."),
    "host": ("host", "Host time of an eager call, beside torch's. Seconds."),
    "ceilings": ("ceilings", "What this GPU's memory and tensor cores reach. Seconds."),
    "tiles": ("tiles", "Every tile configuration, to fit the cost model to. Minutes."),
    "figures": ("figures", "Draw the figures from the records. Needs matplotlib, no GPU."),
    "report": ("report", "Print the tables from the records, or render them into documents. Needs no GPU."),
}


def checkout() -> Path | None:
    """The root of the checkout that holds the benchmarks: the current directory, or the one this file is in."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "benchmarks" / "gemm.py").is_file():
            return root
    return None


def run(name: str, arguments: list[str]) -> int:
    """Run a benchmark of the checkout; returns its exit status. Raises: UnsupportedError (no checkout)."""
    root = checkout()
    if root is None:
        fix = "Clone the repository and run it there."
        raise UnsupportedError(message("bench", "the benchmarks live in a source checkout", "none here", fix))
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = f"benchmarks.{BENCHMARKS[name][0]}"
    if importlib.util.find_spec(module) is None:
        raise UnsupportedError(message("bench", "benchmarks must be importable", f"no {module} in {root}"))
    note(f"{module} of {root}")
    return int(importlib.import_module(module).main(arguments) or 0)


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        try:
            code = run(name, context.args)
        except SystemExit as end:  # Why: what argparse does after --help, and on an option that it does not know.
            code = end.code if isinstance(end.code, int) else EXIT_BAD_INPUT
        if code:
            raise typer.Exit(code)

    return command


# Why no help option: --help is one of the arguments that are passed on.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for _name, (_, _what) in BENCHMARKS.items():
    app.command(_name, help=_what, context_settings=_PASS_ON)(_command(_name))
