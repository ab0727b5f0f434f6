"""`marlin eval`: perplexity, distance from a dense model, continuations side by side, tasks of lm_eval."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from marlin.errors import message, require

CONTINUED_TOKENS = 48


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
    limit: int | None = typer.Option(
        None, "--limit", help="First windows that count, default 40; of each task first questions, default all. 0: all."
    ),
    prompt: list[str] = typer.Option([], "--prompt", help="Also continue this; with --against, by both. Repeatable."),
    tasks: str | None = typer.Option(None, "--tasks", help="Tasks of lm_eval instead of a text, comma-separated."),
    shots: int | None = typer.Option(None, "--shots", help="Examples before each question; default: as the task says."),
    task_folder: Path | None = typer.Option(None, "--task-folder", help="More tasks, in lm_eval's YAML."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float16, bfloat16 or float32."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure perplexity on a text: windows without overlap, each begun as the tokenizer begins a text.

    With --against, also how far the predictions are from another model's at the same positions: KL divergence in nats a
    token, and the share of positions where both find the same token most likely. With --tasks, what the Language Model
    Evaluation Harness finds (pip install lm_eval).

    \b
    Examples:
      marlin eval demo-out/mixed
      marlin eval OUT --text held-out.txt --limit 0 --json
      marlin eval OUT --against MODEL --prompt "The capital of France is"
      marlin eval OUT --tasks arc_easy,hellaswag --limit 200
    """
    from marlin.demo import models

    for path in (directory, against):
        if path is not None:
            models.check_model_directory(path)
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen)
    of_text = {"--text": text, "--against": against, "--prompt": prompt}
    _check_options(tasks, of_text, {"--shots": shots, "--task-folder": task_folder}, limit)
    if tasks is not None:
        asked = {"shots": shots, "limit": limit or None, "folder": task_folder}
        _run_tasks(models.load_model(directory, chosen, precision), tasks, asked, as_json)
        return
    name, content = _text(text)
    loaded = models.load_model(directory, chosen, precision)
    dense = None if against is None else models.load_model(against, chosen, precision)[0]
    windows = (window, 40 if limit is None else limit)
    result = {"directory": str(directory), "text": name, **_run_text(loaded, dense, content, windows, not as_json)}
    if against is not None:
        result["against"] = str(against)
    if prompt:
        result["continuations"] = [_continued((loaded[0], dense), loaded[1], each) for each in prompt]
    (print_json if as_json else _print)(result)


def _check_options(tasks: str | None, of_text: dict[str, Any], of_tasks: dict[str, Any], limit: int | None) -> None:
    """Refuse options that the other kind of evaluation would take."""
    for place, options, right in (("a text", of_text, tasks is None), ("--tasks", of_tasks, tasks is not None)):
        given = ", ".join(name for name, value in options.items() if value not in (None, []))
        require(right or not given, "eval", f"these options go with {place} only", given, "Leave them out.")
    require(limit is None or limit >= 0, "eval", "--limit must be at least 0", str(limit))


def _run_text(loaded: tuple[Any, Any], dense: Any, text: str, windows: tuple[int, int], shown: bool) -> dict[str, Any]:
    """What is measured on a text, and how. windows: their tokens, and how many count."""
    from marlin.demo import models

    model, tokenizer = loaded
    runs = models.path_that_runs(model)
    if shown:
        note(f"path: {runs}")
    started = time.perf_counter()
    return {
        **_measure((model, dense), tokenizer, text, windows, shown),
        "window": windows[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "path": runs,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _print(result: dict[str, Any]) -> None:
    windows = f"{result['windows']} windows of {result['window']} tokens, {result['dtype']}"
    out().print(f"perplexity {result['perplexity']:.3f} on {result['text']}: {windows}", soft_wrap=True)
    if "against" in result:
        out().print(
            f"against {result['against']}: perplexity {result['dense_perplexity']:.3f}, "
            f"divergence {result['divergence']:.4f} nats a token, same next token {result['agreement']:.1%}",
            soft_wrap=True,
        )

    for each in result.get("continuations", ()):
        out().print(f"\n> {each['prompt']}", soft_wrap=True, markup=False)
        for key, label in (("text", result["directory"]), ("dense_text", result.get("against"))):
            if key in each:
                out().print(f"{label}: {each[key].strip()}", soft_wrap=True, markup=False)


def _continued(both: tuple[Any, Any], tokenizer: Any, prompt: str) -> dict[str, str]:
    """A prompt and what (model, dense model or None) make of it, greedily."""
    from marlin.demo import models

    ids, _ = models.encode_prompt(tokenizer, prompt)
    texts = {"prompt": prompt}
    for key, model in zip(("text", "dense_text"), both, strict=True):
        if model is not None:
            texts[key] = models.generate(model, tokenizer, ids, max_new_tokens=CONTINUED_TOKENS).text
    return texts


def _run_tasks(loaded: tuple[Any, Any], tasks: str, asked: dict[str, Any], as_json: bool) -> None:
    from marlin.integrations.lm_eval import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = run_tasks(*loaded, names, **asked)
    if as_json:
        print_json({"tasks": found})
        return
    for name, metrics in found.items():
        numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        out().print(f"{name}: {numbers}", soft_wrap=True, markup=False)


def _measure(
    models: tuple[Any, Any], tokenizer: Any, text: str, windows_of: tuple[int, int], shown: bool
) -> dict[str, Any]:
    """What is measured of (model, dense model or None). windows_of: tokens of a window, and how many count."""
    from marlin import api
    from marlin.evaluate import compare, perplexity, windows

    (model, dense), (window, limit) = models, windows_of
    ids, last, begin = api.tokenize(text, tokenizer), limit or None, api.beginning(tokenizer)
    count = len(windows(ids, window, last))
    with progress_bar(shown) as display:
        show = counter(display, "evaluating")
        if dense is None:
            found = {"perplexity": perplexity(model, ids, window=window, limit=last, begin=begin, progress=show)}
        else:
            found = asdict(compare(model, dense, ids, window=window, limit=last, begin=begin, progress=show))
    return {**found, "windows": count}
