"""`marlin eval`: perplexity of a dense or compressed model directory, and its distance from a dense one."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import torch


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
    against: Path | None = typer.Option(
        None, "--against", help="Dense model directory: adds KL divergence and next-token agreement."
    ),
    window: int = typer.Option(1024, "--window", help="Tokens per window, without overlap."),
    limit: int = typer.Option(40, "--limit", help="First windows that count; 0 takes all."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float16, bfloat16 or float32."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure perplexity on a text: windows without overlap, no special tokens.

    With --against, also how far the predictions are from another model's at the same positions: KL divergence in nats a
    token, and the share of positions where both find the same token most likely.

    \b
    Examples:
      marlin eval demo-out/mixed
      marlin eval OUT --text held-out.txt --limit 0 --json
      marlin eval OUT --against MODEL
    """
    from marlin import api
    from marlin.demo import models

    for path in (directory, against):
        if path is not None:
            models.check_model_directory(path)
    name, content = _text(text)
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen)
    model, tokenizer = models.load_model(directory, chosen, precision)
    dense = None if against is None else models.load_model(against, chosen, precision)[0]
    runs = models.path_that_runs(model)
    if not as_json:
        note(f"path: {runs}")
    started = time.perf_counter()
    measured = _measure((model, dense), api.tokenize(content, tokenizer), window, limit, not as_json)
    result = {
        "directory": str(directory),
        "text": name,
        **measured,
        "window": window,
        "dtype": str(precision).removeprefix("torch."),
        "path": runs,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if against is not None:
        result["against"] = str(against)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    windows = f"{result['windows']} windows of {result['window']} tokens, {result['dtype']}"
    out().print(f"perplexity {result['perplexity']:.3f} on {result['text']}: {windows}", soft_wrap=True)
    if "against" in result:
        out().print(
            f"against {result['against']}: perplexity {result['dense_perplexity']:.3f}, "
            f"divergence {result['divergence']:.4f} nats a token, same next token {result['agreement']:.1%}",
            soft_wrap=True,
        )


def _measure(models: tuple[Any, Any], ids: torch.Tensor, window: int, limit: int, shown: bool) -> dict[str, Any]:
    """What is measured of (model, dense model or None), and over how many windows."""
    from marlin.evaluate import compare, perplexity, windows

    (model, dense), last = models, limit or None
    count = len(windows(ids, window, last))
    with progress_bar(shown) as display:
        show = counter(display, "evaluating")
        if dense is None:
            found = {"perplexity": perplexity(model, ids, window=window, limit=last, progress=show)}
        else:
            found = asdict(compare(model, dense, ids, window=window, limit=last, progress=show))
    return {**found, "windows": count}
