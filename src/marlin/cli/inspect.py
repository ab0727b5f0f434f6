"""`marlin inspect`: what a compressed directory holds, from its headers, and which kernels would run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from marlin.cli.common import out, print_json
from marlin.cli.gpus import GPUS, gpu_here_or

if TYPE_CHECKING:
    from marlin.formats.checkpoint import DirectorySummary, LayerSummary
    from marlin.runtime.driver import DeviceInfo


def _kernel(layer: LayerSummary, tokens: int, dtype: str, device: DeviceInfo) -> str:
    """The entry that would run, or why none."""
    from marlin.errors import MarlinError
    from marlin.runtime import Problem, make_plan
    from marlin.settings import batch_invariant

    spec = layer.spec
    try:
        problem = Problem(tokens, spec.n, spec.k, spec.group_size, dtype, spec.kind, batch_invariant())
        return make_plan(problem, device).variant.entry
    except (MarlinError, ValueError) as error:
        return str(error)


def _report(summary: DirectorySummary, tokens: int, dtype: str, device: DeviceInfo, zeros: bool) -> dict[str, Any]:
    from marlin.runtime import driver

    layers = [
        {**layer.to_dict(zero_fraction=zeros), "kernel": _kernel(layer, tokens, dtype, device)}
        for layer in summary.layers
    ]
    return {
        "directory": str(summary.directory),
        "layers": layers,
        "quantized_bytes": summary.quantized_bytes,
        "unquantized_bytes": sum(summary.unquantized_bytes.values()),
        "total_bytes": summary.total_bytes,
        "bits_per_weight": summary.bits_per_weight,
        "gpu": device.name,
        "gpu_is_here": bool(driver.device_count()),
        "tokens": tokens,
        "dtype": dtype,
    }


def inspect(
    directory: Path = typer.Argument(..., help="Compressed model directory."),
    tokens: int = typer.Option(1, "--tokens", "-m", min=1, help="M, for the kernel that would run."),
    dtype: str = typer.Option("float16", "--dtype", help="float16 or bfloat16, for the kernel that would run."),
    gpu: str | None = typer.Option(None, "--gpu", help=f"{', '.join(GPUS)}; default: the GPU here, else h100."),
    zeros: bool = typer.Option(True, "--zeros/--no-zeros", help="Count zeros, which reads the codes."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show layers, shapes, bytes, bits per weight, zero fraction and the kernel that would run.

    \b
    Examples:
      marlin inspect demo-out/mixed
      marlin inspect OUT --tokens 16 --gpu a100 --json
    """
    from marlin.formats.checkpoint import read_directory_summary

    report = _report(read_directory_summary(directory), tokens, dtype, gpu_here_or(gpu), zeros)
    if as_json:
        print_json(report)
        return
    console = out()
    table = Table(
        "layer", "kind", "N x K", "group", "bytes", "bits/weight", "zeros", "kernel", box=None, pad_edge=False
    )
    for layer in report["layers"]:
        zero = f"{layer['zero_fraction']:.3f}" if zeros else "-"
        extent, bits = f"{layer['n']} x {layer['k']}", f"{layer['bits_per_weight']:.3f}"
        kind = layer["kind"] + (f", rank {layer['low_rank']}" if "low_rank" in layer else "")
        cells = (layer["name"], kind, extent, layer["group_size"], layer["bytes"], bits, zero, layer["kernel"])
        table.add_row(*(escape(str(cell)) for cell in cells))
    width, console.width = console.width, max(console.width, 190)
    console.print(table)
    console.width = width
    kinds = [layer["kind"] for layer in report["layers"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    console.print(
        f"{len(kinds)} compressed layers ({counts}): {report['quantized_bytes'] / 1e6:.1f} MB, "
        f"{report['bits_per_weight']:.3f} bits per weight; everything else {report['unquantized_bytes'] / 1e6:.1f} MB",
        soft_wrap=True,
    )
    where = "the GPU here" if report["gpu_is_here"] and gpu is None else "no GPU here runs it; the CPU reference does"
    console.print(f"kernels: for M={tokens} on {report['gpu']} ({where})", soft_wrap=True)
