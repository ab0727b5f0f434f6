"""`marlin compress`: a Hugging Face model directory in, a compressed one out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
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

    from marlin.compress import Compressed, Options, Recipe


def read_recipe(recipe: str, group_size: int | None, method: str | None) -> Recipe:
    """The preset or JSON file named, with group size and method of its default replaced where they are given.

    Raises: ValueError (neither a preset nor a file, or what the recipe refuses), OSError.
    """
    from marlin.compress import PRESETS, Recipe, preset

    if recipe in PRESETS:
        chosen = preset(recipe, group_size or 128)
    elif recipe.endswith(".json"):
        chosen = Recipe.from_json(Path(recipe).read_text(encoding="utf-8"))
    else:
        requirement = f"--recipe must be one of {', '.join(PRESETS)}, or a .json file"
        raise ValueError(message("compress", requirement, repr(recipe)))
    changes: dict[str, Any] = {}
    if group_size is not None:
        changes["group_size"] = group_size
    if method is not None:
        changes["method"] = method
    return replace(chosen, default=replace(chosen.default, **changes)) if changes else chosen


def _calibration_text(path: Path | None) -> tuple[str, str]:
    """(name, text): the file or directory, or the demo's calibration text when it is there. Raises: ValueError."""
    if path is not None:
        return str(path), read_text(path)
    from marlin.demo.data import calibration_if_prepared

    text = calibration_if_prepared()
    if text is None:
        fix = "Pass --calibration FILE, or run `marlin demo` once, which prepares one."
        got = "no --calibration and no demo text"
        raise ValueError(message("compress", "there must be a text to calibrate on", got, fix))
    return "demo calibration wiki", text


def _check_packable(recipe: Recipe) -> None:
    """Refuse before any work a recipe whose result could not be saved."""
    kinds = {recipe.default.kind, *(layer.kind for _, layer in recipe.rules)}
    if not kinds & {"w4a16_sp24", "w4a16_dense"}:
        requirement = "the recipe must have a kind that is saved packed (w4a16_sp24 or w4a16_dense)"
        raise ValueError(message("compress", requirement, ", ".join(sorted(kinds)), "Use --recipe sp24-int4."))


def _saved_dtype(dtype: str, directory: Path) -> torch.dtype:
    """Of scales and of all that stays floating point: the one named, or the model's own where it has 16 bits."""
    import torch

    if dtype == "auto":
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        own = config.get("dtype") or config.get("torch_dtype")
        return torch.bfloat16 if own == "bfloat16" else torch.float16
    return choose_dtype(dtype, torch.device("cpu"))


def _summary(output: Path, recipe: str, calibration: str, compressed: Compressed) -> dict[str, Any]:
    errors = [row.relative_error for row in compressed.report if row.relative_error is not None]
    return {
        "output": str(output),
        "recipe": recipe,
        "calibration": calibration,
        "layers": dict(Counter(row.kind for row in compressed.report)),
        "bits_per_weight": compressed.bits_per_weight(),
        "worst_relative_error": max(errors, default=None),
        "seconds": round(compressed.seconds, 1),
    }


def _run(
    paths: tuple[Path, Path], calibration: tuple[str, int, int], recipe: Recipe, options: Options, dtype: torch.dtype
) -> Compressed:
    """Load paths[0], compress on `calibration` (text, samples, length), and save as paths[1]."""
    import torch

    from marlin import api
    from marlin.compress import calibration_windows
    from marlin.demo.models import load_model

    # Why: the CPU multiplies float32 fast and 16 bits slowly; a GPU takes the blocks one by one as they are.
    precision = torch.float32 if torch.device(options.device).type == "cpu" else dtype
    model, tokenizer = load_model(paths[0], torch.device("cpu"), precision)
    text, samples, length = calibration
    windows = calibration_windows(api.tokenize(text, tokenizer), samples, length, options.seed)
    compressed = api.compress(model, windows, recipe, options=options, dtype=dtype)
    api.save_pretrained(model, paths[1], tokenizer=tokenizer, report=compressed, recipe=recipe)
    return compressed


def compress(
    model: Path = typer.Argument(..., help="Hugging Face directory of the dense model."),
    output: Path = typer.Argument(..., help="Directory to write; replaced only when it is an earlier result."),
    recipe: str = typer.Option("sp24-int4", "--recipe", "-r", help="Preset, or a recipe's .json file."),
    calibration: Path | None = typer.Option(
        None, "--calibration", "-c", help="UTF-8 text, or directory of *.txt; default: the demo's text if prepared."
    ),
    samples: int = typer.Option(32, "--samples", min=1, help="Calibration windows."),
    length: int = typer.Option(1024, "--length", min=1, help="Tokens per calibration window."),
    group_size: int | None = typer.Option(None, "--group-size", "-g", help="32, 64, 128 or -1 (one scale per row)."),
    method: str | None = typer.Option(None, "--method", help="Replaces the method of the recipe's default."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N; holds one block at a time."),
    dtype: str = typer.Option("auto", "--dtype", help="Of scales and unquantized tensors: float16 or bfloat16."),
    resume_dir: Path | None = typer.Option(None, "--resume-dir", help="Keep finished blocks here, and continue."),
    seed: int = typer.Option(0, "--seed", help="Of the choice of calibration windows."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Prune to 2:4, quantize to INT4, and save a directory that transformers loads after `import marlin`.

    Presets: sp24-int4 (2:4 INT4), int4 (dense INT4), and baselines of both. A recipe file gives each layer its own
    kind, by name pattern.

    \b
    Examples:
      marlin compress MODEL OUT --calibration text.txt
      marlin compress MODEL OUT -r int4 -g 64 --samples 64 --resume-dir /tmp/resume
      marlin compress MODEL OUT -r recipe.json --device cuda --json
    """
    from marlin.demo import models

    models.check_model_directory(model)
    chosen_recipe = read_recipe(recipe, group_size, method)
    _check_packable(chosen_recipe)
    name, text = _calibration_text(calibration)

    from marlin.compress import Options
    from marlin.formats.atomic import check_replaceable
    from marlin.formats.checkpoint import is_directory_of_ours

    check_replaceable(output, False, is_directory_of_ours)
    chosen = choose_device(device)
    with progress_bar(not as_json) as display:
        show = counter(display, "compressing blocks")
        options = Options(chosen, seed, resume_dir=resume_dir, progress=lambda event: show(event.done, event.total))
        saved = _saved_dtype(dtype, model)
        compressed = _run((model, output), (text, samples, length), chosen_recipe, options, saved)
    summary = _summary(output, recipe, name, compressed)
    if as_json:
        print_json(summary)
        return
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(summary["layers"].items()))
    out().print(
        f"wrote {output}: {layers}; {summary['bits_per_weight']:.3f} bits per weight in {summary['seconds']:.0f} s",
        soft_wrap=True,
        markup=False,
    )
    note(f"Next: marlin inspect {output}; marlin generate {output} PROMPT")
