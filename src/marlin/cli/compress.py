"""`marlin compress`: a Hugging Face model directory in, a compressed one out, with recovery and automatic recipes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from marlin.cli import recovery
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

if TYPE_CHECKING:
    import torch

    from marlin.compress import Compressed, Event, Options, Recipe


AUTO = "auto"
GROUP_SIZE = 128
PROBE = (4, 512)


@dataclass(frozen=True)
class Job:
    """What one run does. recipe: None stands for an automatic one of `budget` (keywords of `auto.plan`)."""

    source: Path
    output: Path
    text: str
    samples: int
    length: int
    recipe: Recipe | None
    group_size: int
    budget: dict[str, float]
    options: Options
    dtype: torch.dtype
    minutes: float | None
    stream: bool
    shown: bool


def read_recipe(recipe: str, group_size: int | None, method: str | None, low_rank: int | None = None) -> Recipe:
    """The preset or JSON file named, with group size and method of its default replaced where they are given, and the
    rank of all that is saved packed.

    Raises: ValueError (neither a preset nor a file, or what the recipe refuses), OSError.
    """
    from marlin.compress import PRESETS, Recipe, preset
    from marlin.compress.recipe import PACKED

    if recipe in PRESETS:
        chosen = preset(recipe, group_size or GROUP_SIZE)
    elif recipe.endswith(".json"):
        chosen = Recipe.from_json(Path(recipe).read_text(encoding="utf-8"))
    else:
        requirement = f"--recipe must be one of {', '.join(PRESETS)}, {AUTO}, or a .json file"
        raise ValueError(message("compress", requirement, repr(recipe)))
    default = chosen.default
    if group_size is not None:
        default = replace(default, group_size=group_size)
    if method is not None:
        default = default.with_method(method)
    if low_rank is None:
        return replace(chosen, default=default)
    layers = [layer for _, layer in chosen.rules] + [default]
    ranked = [replace(layer, low_rank=low_rank) if layer.kind in PACKED else layer for layer in layers]
    rules = tuple((pattern, layer) for (pattern, _), layer in zip(chosen.rules, ranked, strict=False))
    return Recipe(rules, ranked[-1])


def calibration_text(path: Path | None, op: str = "compress") -> tuple[str, str]:
    """(name, text): the file or directory, or the demo's calibration text when it is there. Raises: ValueError."""
    if path is not None:
        return str(path), read_text(path)
    from marlin.demo.data import calibration_if_prepared

    text = calibration_if_prepared()
    if text is None:
        fix = "Pass --calibration FILE, or run `marlin demo` once, which prepares one."
        got = "no --calibration and no demo text"
        raise ValueError(message(op, "there must be a text to calibrate on", got, fix))
    return "demo calibration wiki", text


def _packable(recipe: Recipe) -> Recipe:
    """The recipe, unless its result could not be saved. Raises: ValueError."""
    kinds = {recipe.default.kind, *(layer.kind for _, layer in recipe.rules)}
    if not kinds & {"w4a16_sp24", "w4a16_dense"}:
        requirement = "the recipe must have a kind that is saved packed (w4a16_sp24 or w4a16_dense)"
        raise ValueError(message("compress", requirement, ", ".join(sorted(kinds)), "Use --recipe sp24-int4."))
    return recipe


def _chosen(recipe: str, group_size: int | None, method: str | None, low_rank: int | None) -> Recipe | None:
    """The recipe that the options describe; None where it is made automatically. Raises: as `read_recipe`."""
    if recipe != AUTO:
        return _packable(read_recipe(recipe, group_size, method, low_rank))
    got = f"--low-rank {low_rank}"
    require(low_rank is None, "compress", "--recipe auto takes no low-rank correction", got, "Leave it out.")
    return None


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
        **({"reconstruction": compressed.reconstruction()} if compressed.blocks else {}),
    }


def _devices(names: str) -> list[torch.device]:
    """The devices named, with commas between them. Raises: as `choose_device`."""
    return [choose_device(name.strip()) for name in names.split(",")]


def _shows_blocks(display: Any, description: str) -> Callable[[Event], None]:
    """Progress through the blocks on one bar of display, with the error of one that is being trained."""
    task = display.add_task(description, total=None)

    def show(event: Event) -> None:
        more = "" if event.error is None else f", training block {event.done}: error {event.error:.4f}"
        display.update(task, completed=event.done, total=event.total, description=description + more)

    return show


def _check_dense(model: Path) -> None:
    """Raises: ValueError (no model directory, or a compressed one)."""
    from marlin.demo.models import check_model_directory
    from marlin.formats.checkpoint import is_directory_of_ours

    check_model_directory(model)
    fix = "Compress the model that it was made of."
    require(not is_directory_of_ours(model), "compress", "MODEL must be dense", f"{model}, compressed", fix)


def _budget(recipe: str, bits: float | None, max_ppl_increase: float | None) -> dict[str, float]:
    """The one budget of an automatic recipe. Raises: ValueError (none or both, or given for another recipe)."""
    given = {"bits": bits, "max_ppl_increase": max_ppl_increase}
    budget = {name: value for name, value in given.items() if value is not None}
    got = " and ".join(f"--{name.replace('_', '-')}" for name in budget) or "neither"
    if recipe == AUTO and len(budget) != 1:
        raise ValueError(message("compress", "--recipe auto takes one of --bits and --max-ppl-increase", got))
    if recipe != AUTO and budget:
        raise ValueError(message("compress", "a budget needs --recipe auto", got))
    return budget


def _planned(job: Job, model: Any, stream: torch.Tensor, begin: int | None) -> Recipe:
    """The automatic recipe; says what it is before it is used. Experts of the model are split, to be planned for."""
    from marlin import experts
    from marlin.compress import auto, calibration_windows

    experts.split(model)
    drawn = calibration_windows(stream, job.samples + PROBE[0], job.length, job.options.seed, begin)
    probe = drawn[job.samples :, : PROBE[1]].contiguous()
    with progress_bar(job.shown) as display:
        first, second = counter(display, "all layers to 2:4"), counter(display, "measuring what each block costs")
        options = replace(job.options, progress=lambda event: first(event.done, event.total))
        found = auto.plan(
            model,
            drawn[: job.samples],
            probe,
            **job.budget,
            group_size=job.group_size,
            options=options,
            progress=second,
        )
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(found.layers.items()))
    ratio = "" if found.perplexity_ratio is None else f"; perplexity about {found.perplexity_ratio:.2f}x dense"
    note(f"plan: {layers}; {found.bits_per_weight:.3f} bits per weight, {found.stored_bytes / 1e6:,.1f} MB{ratio}")
    return found.recipe


def _precision(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of the model while it is compressed."""
    import torch

    # Why: the CPU multiplies float32 fast and 16 bits slowly; a GPU takes the blocks one by one as they are.
    return torch.float32 if device.type == "cpu" else dtype


def _streams(wanted: bool | None, source: Path, loads: bool) -> bool:
    """Whether blocks come one by one out of the files. loads: whether something asked for needs the whole model.

    Raises: ValueError (both asked for).
    """
    from marlin.streaming import is_worth_it

    got = "--stream with --recover or --recipe auto"
    require(not (wanted and loads), "compress", "--stream holds one block at a time", got, "Leave one of them out.")
    return is_worth_it(source) and not loads if wanted is None else wanted


def _stream(job: Job) -> Compressed:
    """Compress block by block out of the files."""
    from transformers import AutoTokenizer

    from marlin import api
    from marlin.compress import calibration_windows
    from marlin.demo.models import quiet_transformers
    from marlin.streaming import Precision, compress_directory

    quiet_transformers()
    assert job.recipe is not None
    tokenizer = AutoTokenizer.from_pretrained(str(job.source), local_files_only=True)
    stream, begin = api.tokenize(job.text, tokenizer), api.beginning(tokenizer)
    windows = calibration_windows(stream, job.samples, job.length, job.options.seed, begin)
    precision = Precision(_precision(job.options.first_device, job.dtype), job.dtype)
    with progress_bar(job.shown) as display:
        options = replace(job.options, progress=_shows_blocks(display, "compressing blocks out of the files"))
        return compress_directory(
            job.source, job.output, windows, job.recipe, precision=precision, tokenizer=tokenizer, options=options
        )


def _run(job: Job) -> tuple[Compressed, dict[str, Any] | None]:
    """Load, plan, compress, recover and save; returns what was compressed and the report of the recovery."""
    import torch

    from marlin import api
    from marlin.compress import calibration_windows
    from marlin.demo.models import load_model

    if job.stream:
        return _stream(job), None
    device = job.options.first_device
    precision = _precision(device, job.dtype)
    model, tokenizer = load_model(job.source, torch.device("cpu"), precision)
    stream, begin = api.tokenize(job.text, tokenizer), api.beginning(tokenizer)
    recipe = _planned(job, model, stream, begin) if job.recipe is None else job.recipe
    windows = calibration_windows(stream, job.samples, job.length, job.options.seed, begin)
    with progress_bar(job.shown) as display:
        options = replace(job.options, progress=_shows_blocks(display, "compressing blocks"))
        compressed = api.compress(model, windows, recipe, options=options, dtype=job.dtype)
    report, numbers = None, None
    if job.minutes is not None:
        folder = None if options.resume_dir is None else Path(options.resume_dir)
        given = recovery.settings(job.minutes, device, options.seed, folder)
        teacher, _ = load_model(job.source, torch.device("cpu"), torch.float32)
        recovery.warn_without_gpu(teacher, given)

        def work(progress: Any) -> dict[str, Any]:
            return api.recover(model, teacher, stream, recovery=replace(given, begin=begin, progress=progress))

        report = recovery.run(work, job.minutes, job.shown)
        numbers = recovery.numbers(report)
    api.save_pretrained(model, job.output, tokenizer=tokenizer, report=compressed, recipe=recipe, numbers=numbers)
    return compressed, report


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
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N; several share: cuda:0,cuda:1."),
    dtype: str = typer.Option("auto", "--dtype", help="Of scales and unquantized tensors: float16 or bfloat16."),
    low_rank: int | None = typer.Option(None, "--low-rank", metavar="R", help="Add 16-bit corrections of this rank."),
    reconstruct: int = typer.Option(0, "--reconstruct", metavar="STEPS", help="Train each block so many steps."),
    bits: float | None = typer.Option(None, "--bits", help="Of --recipe auto: at most so many bits per weight."),
    max_ppl_increase: float | None = typer.Option(None, help="Of --recipe auto: at most so much more, e.g. 0.15."),
    recover: float | None = typer.Option(None, "--recover", metavar="MINUTES", help="Then train so long; wants a GPU."),
    resume_dir: Path | None = typer.Option(None, "--resume-dir", help="Keep what is finished here, and continue."),
    stream: bool | None = typer.Option(None, help="One block in memory at a time; default: where memory is short."),
    seed: int = typer.Option(0, "--seed", help="Of the choice of calibration windows."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Prune to 2:4, quantize to INT4, and save a directory that transformers loads after `import marlin`.

    Presets: sp24-int4 (2:4 INT4), sp24-int4-fast (sooner done, less exact), int4 (dense INT4), and
    baselines. A recipe file gives each layer its own kind, by name pattern; `auto` measures which layers stand 2:4.

    \b
    Examples:
      marlin compress MODEL OUT --calibration text.txt
      marlin compress MODEL OUT -r int4 -g 64 --samples 64 --resume-dir /tmp/resume
      marlin compress MODEL OUT -r recipe.json --device cuda:0,cuda:1 --json
      marlin compress MODEL OUT --recipe auto --bits 3.5
      marlin compress MODEL OUT -g 64 --reconstruct 384 --recover 20 --resume-dir /tmp/resume
    """
    _check_dense(model)
    budget = _budget(recipe, bits, max_ppl_increase)
    chosen_recipe = _chosen(recipe, group_size, method, low_rank)
    require(recover is None or recover > 0, "compress", "--recover must be above 0 minutes", str(recover))
    name, text = calibration_text(calibration)

    from marlin.compress import Options
    from marlin.formats.atomic import check_replaceable
    from marlin.formats.checkpoint import is_directory_of_ours

    check_replaceable(output, False, is_directory_of_ours)
    options = Options(_devices(device), seed, reconstruct=reconstruct, resume_dir=resume_dir)
    job = Job(
        model, output, text, samples, length, chosen_recipe, group_size or GROUP_SIZE, budget, options,
        _saved_dtype(dtype, model), recover, _streams(stream, model, bool(recover) or recipe == AUTO), not as_json,
    )  # fmt: skip
    compressed, report = _run(job)
    summary = _summary(output, recipe, name, compressed)
    if report is not None:
        summary["recovery"] = recovery.summary(report)
    (print_json if as_json else _print)(summary)


def _trained(shown: dict[str, Any]) -> str:
    """What came of the blocks' training, in words."""
    change = f"{shown['error_before']:.4f} to {shown['error_after']:.4f}"
    return f"trained {shown['blocks']} blocks, {shown['steps']} steps each: error of held-out outputs {change}"


def _print(summary: dict[str, Any]) -> None:
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(summary["layers"].items()))
    lines = [
        f"wrote {summary['output']}: {layers}; {summary['bits_per_weight']:.3f} bits per weight "
        f"in {summary['seconds']:.0f} s"
    ]
    if "reconstruction" in summary:
        lines.append(_trained(summary["reconstruction"]))
    if "recovery" in summary:
        lines.append(recovery.sentence(summary["recovery"]))
    for line in lines:
        out().print(line, soft_wrap=True, markup=False)
    note(f"Next: marlin inspect {summary['output']}; marlin generate {summary['output']} PROMPT")
