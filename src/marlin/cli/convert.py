"""`marlin convert`: a checkpoint of another tool in, a directory that loads and runs here out, or the other way."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from marlin.cli.common import counter, note, out, print_json, progress_bar
from marlin.errors import message

if TYPE_CHECKING:
    from marlin.convert import Conversion


def _report(done: Conversion) -> dict[str, Any]:
    return {
        "output": str(done.directory),
        "source_format": done.source_format,
        "target_format": done.target_format,
        "layers": [asdict(row) for row in done.layers],
        "quantized_bytes_before": sum(row.bytes_before for row in done.layers),
        "quantized_bytes_after": sum(row.bytes_after for row in done.layers),
        "other_tensors": done.other_tensors,
        "other_bytes": done.other_bytes,
    }


def _table(done: Conversion) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    for name in ("layers", "MB before", "MB after"):
        table.add_column(name, justify="right")
    for kind, (count, before, after) in sorted(done.kinds().items()):
        table.add_row(kind, str(count), f"{before / 1e6:.1f}", f"{after / 1e6:.1f}")
    others = f"{done.other_bytes / 1e6:.1f}"
    table.add_row("not quantized", f"{done.other_tensors} tensors", others, others)
    return table


def convert(
    source: Path = typer.Argument(..., metavar="IN", help="Directory of a published checkpoint, or of ours."),
    output: Path = typer.Argument(..., metavar="OUT", help="Directory to write, whole or not at all."),
    to: str = typer.Option("marlin", "--to", help="marlin, or pack-quantized (compressed-tensors, 2:4 as zeros)."),
    quantize: bool = typer.Option(False, "--quantize", help="Round 2:4 weights in floating point to INT4."),
    group_size: int | None = typer.Option(
        None, "--group-size", "-g", help="Of --quantize: 32, 64, 128 (the default) or -1 (one scale per row)."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT, whatever it holds."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Convert a published INT4 checkpoint, bit for bit, to one that transformers loads after `import marlin`.

    Reads compressed-tensors marlin-24, pack-quantized and sparse-24-bitmask, GPTQ (also marlin_24 and marlin) and AWQ,
    symmetric and 4 bits; what cannot be read is refused by name. Layers whose zeros are 2:4 become sparse.

    \b
    Examples:
      marlin convert MODEL-marlin24 OUT
      marlin convert OUT PLAIN --to pack-quantized
      marlin convert PRUNED OUT --quantize -g 64
    """
    from marlin.convert import convert as convert_directory

    if group_size is not None and not quantize:
        need = "--group-size needs --quantize: a checkpoint that is quantized keeps its own"
        raise ValueError(message("convert", need, str(group_size), "Leave --group-size out."))
    with progress_bar(not as_json) as display:
        done = convert_directory(
            source,
            output,
            to=to,
            quantize_to=(group_size or 128) if quantize else None,
            overwrite=overwrite,
            progress=counter(display, "converting layers"),
        )
    if as_json:
        print_json(_report(done))
        return
    console = out()
    console.print(_table(done))
    console.print(f"wrote {output}: {done.source_format} to {done.target_format}", soft_wrap=True, markup=False)
    if done.target_format == "marlin":
        note(f"Next: marlin inspect {output}; marlin generate {output} PROMPT")
