"""What the commands share: consoles, errors, JSON, progress, choosing device and dtype, reading models and text.

Owns the exit codes: 0 success, 1 a check failed, 2 bad input or an environment that cannot do what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from marlin.errors import MarlinError, UnsupportedError, message

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "sparse-marlin"
EXIT_CHECK_FAILED, EXIT_BAD_INPUT = 1, 2
_SHOWN_AS_ONE_LINE = (MarlinError, ValueError, TypeError, OSError, ImportError)
_debug = False


def out() -> Console:
    """Results; built per call, so that a redirected stdout is honoured."""
    return Console(highlight=False)


def err() -> Console:
    """Progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line for the reader on stderr."""
    err().print(escape(text), style="dim", soft_wrap=True)


def set_debug(debug: bool) -> None:
    """Whether errors keep their traceback."""
    global _debug
    _debug = debug


def version_text() -> str:
    """`sparse-marlin <version>`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        import marlin

        return f"{DISTRIBUTION} {marlin.__version__} (running from source)"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class Group(TyperGroup):
    """A command group that prints the project's errors as one red line and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except Exception as error:
            out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
            if _debug or not (out_of_memory or isinstance(error, _SHOWN_AS_ONE_LINE)):
                raise
            text = _one_line(error)
            err().print(f"[bold red]error:[/] [red]{escape(text)}[/]", soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None


def print_json(data: Any) -> None:
    """Machine-readable result on stdout."""
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """A progress display on stderr."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err(), disable=not enabled) as display:
        yield display


def counter(display: Progress, description: str) -> Callable[[int, int], None]:
    """A callback (done, total) that drives one bar of display."""
    task = display.add_task(description, total=None)
    return lambda done, total: display.update(task, completed=done, total=total)


def choose_device(device: str) -> torch.device:
    """The torch device named, or for "auto" the first GPU that the kernels run on, else the CPU.

    Raises: ValueError (no such device), UnsupportedError (GPU older than compute capability 8.0).
    """
    import torch

    if device == "auto":
        usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        return torch.device("cuda" if usable else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(message("--device", "must be auto, cpu, cuda or cuda:N", repr(device))) from error
    if chosen.type == "cuda":
        fix = "Run `marlin doctor`, or use --device cpu."
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(message("--device", "the GPU must be there", f"{device!r}, not found by torch", fix))
        capability = torch.cuda.get_device_capability(chosen)
        if capability < (8, 0):
            got = f"{capability[0]}.{capability[1]}"
            raise UnsupportedError(message("--device", "compute capability must be 8.0 or newer", got, fix))
    elif chosen.type != "cpu":
        raise ValueError(message("--device", "must be auto, cpu, cuda or cuda:N", repr(device)))
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype named, or for "auto" float16 on a GPU and float32 on the CPU. Raises: ValueError."""
    import torch

    names = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in names:
        raise ValueError(message("--dtype", f"must be auto or one of {', '.join(names)}", repr(dtype)))
    return names[dtype]


def read_text(path: Path) -> str:
    """UTF-8 text of a file, or of all *.txt files of a directory in name order. Raises: ValueError, OSError."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(message("marlin", "the directory must hold *.txt files", f"none in {str(path)!r}"))
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(message("marlin", f"{path} must be UTF-8 text", str(error))) from error
