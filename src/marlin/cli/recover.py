"""`marlin recover`: train a compressed model directory against its dense original, and write the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from marlin.cli import recovery
from marlin.cli.common import choose_device, note, out, print_json
from marlin.cli.compress import calibration_text
from marlin.errors import message, require


def _report_of(directory: Path) -> dict[str, Any]:
    """What the compression of a directory left beside the weights; empty where it is not there."""
    from marlin.api import REPORT_FILE

    path = directory / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "Delete it, or copy it again."
        raise ValueError(message("recover", f"{path} must be readable JSON", str(error), fix)) from error
    require(isinstance(found, dict), "recover", f"{path} must hold a JSON object", type(found).__name__)
    return dict(found)


def recover(
    directory: Path = typer.Argument(..., help="Compressed model directory."),
    dense: Path = typer.Argument(..., help="Hugging Face directory of the dense model that it was made from."),
    output: Path = typer.Argument(..., help="Directory to write; replaced only when it is an earlier result."),
    minutes: float = typer.Option(20.0, "--minutes", help="Of everything but loading and saving; wants a GPU."),
    calibration: Path | None = typer.Option(
        None, "--calibration", "-c", help="UTF-8 text, or directory of *.txt; default: the demo's text if prepared."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N; holds both models."),
    resume_dir: Path | None = typer.Option(None, "--resume-dir", help="Keep the state here, and continue."),
    seed: int = typer.Option(0, "--seed", help="Of the text that the dense model writes, and of the batches."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Bring quality back by training: masks and sizes stay, codes, scales, norms and biases learn from the dense model.

    What `marlin compress --recover` does after compressing, for a directory that is already there.

    \b
    Examples:
      marlin recover OUT MODEL BETTER --minutes 20
      marlin recover OUT MODEL BETTER --calibration text.txt --resume-dir /tmp/resume
    """
    from marlin.demo import models

    for path in (directory, dense):
        models.check_model_directory(path)
    require(minutes > 0, "recover", "--minutes must be above 0", str(minutes))
    from marlin.formats.atomic import check_replaceable
    from marlin.formats.checkpoint import is_directory_of_ours

    order = "The order is: compressed, dense, result."
    require(is_directory_of_ours(directory), "recover", "the first directory must be compressed", str(directory), order)
    require(not is_directory_of_ours(dense), "recover", "the second directory must be dense", str(dense), order)
    check_replaceable(output, False, is_directory_of_ours)
    name, text = calibration_text(calibration, "recover")
    given = recovery.settings(minutes, choose_device(device), seed, resume_dir)
    report = _run(directory, dense, output, text, given, not as_json)
    trained = recovery.summary(report)
    summary = {"output": str(output), "calibration": name, "recovery": trained}
    if as_json:
        print_json(summary)
        return
    out().print(f"wrote {output}: {recovery.sentence(trained)}", soft_wrap=True, markup=False)
    note(f"Next: marlin eval {output} --against {dense}")


def _run(directory: Path, dense: Path, output: Path, text: str, given: Any, shown: bool) -> dict[str, Any]:
    """Load both models, train, save; returns the report."""
    import torch

    from marlin import api
    from marlin.demo import models

    record = _report_of(directory)
    model = api.load(directory).eval()
    teacher, tokenizer = models.load_model(dense, torch.device("cpu"), torch.float32)
    recovery.warn_without_gpu(teacher, given)
    stream, begin = api.tokenize(text, tokenizer), api.beginning(tokenizer)

    def work(progress: Any) -> dict[str, Any]:
        return api.recover(model, teacher, stream, recovery=replace(given, begin=begin, progress=progress))

    report: dict[str, Any] = recovery.run(work, given.minutes, shown)
    earlier = record.get("numbers")
    numbers = {**(earlier if isinstance(earlier, dict) else {}), **recovery.numbers(report)}
    api.save_pretrained(model, output, tokenizer=tokenizer, report=record, numbers=numbers)
    return report
