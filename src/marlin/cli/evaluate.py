"""`marlin eval`: perplexity of a dense or compressed model directory."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from marlin.cli.common import (
    choose_device,
    choose_dtype,
    counter,
    note,
    out,
    print_json,
    progress_bar,
    read_text,
)
from marlin.errors import message


def _text(path: Path | None) -> tuple[str, str]:
    """(name, text) to evaluate on: the file, or the demo's held-out text when it is there. Raises: ValueError."""
    if path is not None:
        return str(path), read_text(path)
    from marlin.demo.data import held_out_if_prepared

    text = held_out_if_prepared()
    if text is None:
        fix = "Pass --text FILE, or run `marlin demo` once, which prepares a held-out text."
        raise ValueError(message("eval", "there must be a text to evaluate on", "no --text and no demo text", fix))
    return "demo held-out wiki", text


def evaluate(
    directory: Path = typer.Argument(..., help="Model directory, dense or compressed."),
    text: Path | None = typer.Option(
        None, "--text", help="UTF-8 text file, or directory of *.txt; default: the demo's held-out text if prepared."
    ),
    window: int = typer.Option(1024, "--window", help="Tokens per window, without overlap."),
    limit: int = typer.Option(40, "--limit", help="First windows that count; 0 takes all."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float16, bfloat16 or float32."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure perplexity on a text: windows without overlap, no special tokens.

    \b
    Examples:
      marlin eval demo-out/mixed
      marlin eval OUT --text held-out.txt --limit 0 --json
    """
    from marlin import api
    from marlin.demo import models
    from marlin.evaluate import perplexity

    models.check_model_directory(directory)
    name, content = _text(text)
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen)
    model, tokenizer = models.load_model(directory, chosen, precision)
    ids = api.tokenize(content, tokenizer)
    path = models.path_that_runs(model)
    if not as_json:
        note(f"path: {path}")
    started = time.perf_counter()
    windows = [0]
    with progress_bar(not as_json) as display:
        show = counter(display, "evaluating")

        def advance(done: int, total: int) -> None:
            windows[0] = done
            show(done, total)

        value = perplexity(model, ids, window=window, limit=limit or None, progress=advance)
    result = {
        "directory": str(directory),
        "text": name,
        "perplexity": value,
        "windows": windows[0],
        "window": window,
        "dtype": str(precision).removeprefix("torch."),
        "path": path,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print_json(result)
        return
    out().print(
        f"perplexity {value:.3f} on {name}: {windows[0]} windows of {window} tokens, {result['dtype']}", soft_wrap=True
    )
