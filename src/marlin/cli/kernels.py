"""`marlin kernels`: list the variants, build them ahead of time, write one as a .cu, explain a choice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from marlin.cli.common import EXIT_CHECK_FAILED, counter, err, note, out, print_json, progress_bar
from marlin.cli.gpus import GPUS, gpu_here_or
from marlin.errors import message

if TYPE_CHECKING:
    from marlin.runtime.build import BuildRow
    from marlin.runtime.catalog import AnyVariant

RUNNERS_UP = 5  # that `explain` shows unless told otherwise

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="The CUDA kernels: list, build ahead of time, write as .cu, explain the choice for a shape.",
)


def _select(only: str | None) -> list[AnyVariant]:
    from marlin.runtime.catalog import all_kernels

    variants = [v for v in all_kernels() if only is None or only in v.entry]
    if not variants:
        raise ValueError(
            message("kernels", "--only must be part of an entry's name", repr(only), "See marlin kernels list.")
        )
    return variants


@app.command("list")
def list_variants(
    only: str | None = typer.Option(None, "--only", help="Only entries whose name contains this."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List every kernel that can be chosen at run time.

    \b
    Examples:
      marlin kernels list
      marlin kernels list --only sp24_fp16_g128 --json
    """
    rows = [
        {
            "entry": v.entry,
            "name": v.name,
            "kind": v.kind,
            "dtype": v.dtype,
            "group_size": v.group_size,
            "threads": v.threads,
            "smem_bytes": v.smem_bytes,
        }
        for v in _select(only)
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("entry", "dtype", "group", "threads", "smem bytes", box=None, pad_edge=False)
    for row in rows:
        cells = (row[key] for key in ("entry", "dtype", "group_size", "threads", "smem_bytes"))
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    console = out()
    console.width = max(console.width, 110)
    console.print(table)
    console.print(f"{len(rows)} kernels")


def _archs(requested: str | None) -> list[str]:
    if requested:
        return [part.strip().removeprefix("sm_").replace(".", "") for part in requested.split(",")]
    from marlin.runtime import compiler, driver

    count = driver.device_count()
    if not count:
        fix = "Name the architectures: --arch 80,90."
        raise ValueError(message("kernels build", "there must be a GPU to take the architecture from", "none", fix))
    found = {driver.device_info(index).arch for index in range(count)}
    return [compiler.arch_for(arch) for arch in sorted(found)]


@app.command()
def build(
    arch: str | None = typer.Option(None, "--arch", help="Architectures, e.g. 80,86,90. Default: the GPUs here."),
    only: str | None = typer.Option(None, "--only", help="Only entries whose name contains this."),
    jobs: int = typer.Option(0, "--jobs", "-j", help="Processes at once; 0 takes one a core."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Compile kernels into the cache ahead of time; needs no GPU when --arch is given.

    Exits with 1 when a kernel does not compile, spills registers or needs a stack.

    \b
    Examples:
      marlin kernels build
      marlin kernels build --arch 80,90 --only sp24_fp16 --jobs 4
    """
    from marlin.runtime.build import build_all

    variants, archs = _select(only), _archs(arch)
    rows: list[BuildRow] = []
    with progress_bar(not as_json) as display:
        show, total = counter(display, f"compiling for sm_{', sm_'.join(archs)}"), len(variants) * len(archs)
        show(0, total)

        def done(row: BuildRow) -> None:
            rows.append(row)
            show(len(rows), total)

        rows_in_order = build_all(variants, archs, jobs or None, progress=done)
    if as_json:
        print_json([row.as_dict() for row in rows_in_order])
    else:
        table = Table("entry", "arch", "registers", "spills", "smem bytes", "seconds", "", box=None, pad_edge=False)
        for row in rows_in_order:
            cells = (row.entry, f"sm_{row.arch}", row.registers, row.spill_bytes, row.smem_bytes, f"{row.seconds:.1f}")
            table.add_row(*map(str, cells), escape("; ".join(row.problems)) or ("cached" if row.stored else ""))
        console = out()
        console.width = max(console.width, 130)
        console.print(table)
    bad = sum(bool(row.problems) for row in rows_in_order)
    if bad:
        err().print(f"[bold red]error:[/] [red]kernels build: {bad} of {total} kernels have problems.[/]")
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def emit(
    name: str = typer.Argument(
        ...,
        help="Kernel family: sm80_w4a16_sp24, sm80_w4a16_dense, the same with sm90_, or with sm80_expand_.",
    ),
    output: Path | None = typer.Option(None, "--output", "-o", help="File to write; stdout when left out."),
    dtype: str = typer.Option("float16", "--dtype", help="float16 or bfloat16."),
    group_size: int = typer.Option(128, "--group-size", help="32, 64, 128 or -1."),
) -> None:
    """Write one self-contained .cu with an extern "C" launcher, to build with plain nvcc.

    \b
    Examples:
      marlin kernels emit sm80_w4a16_sp24 -o kernel.cu
      marlin kernels emit sm80_w4a16_dense --dtype bfloat16 --group-size -1
      marlin kernels emit sm90_w4a16_sp24 -o kernel.cu
      marlin kernels emit sm80_expand_w4a16_dense --group-size 32
    """
    from marlin.runtime import emit as emitter

    text = emitter.emit(name, dtype=dtype, group_size=group_size)
    if output is None:
        typer.echo(text)
        return
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    note(f"wrote {output}")


@app.command()
def explain(
    m: int = typer.Argument(..., help="Tokens."),
    n: int = typer.Argument(..., help="Out-features."),
    k: int = typer.Argument(..., help="In-features (dense positions)."),
    kind: str = typer.Option("w4a16_sp24", "--kind", help="w4a16_sp24 or w4a16_dense."),
    dtype: str = typer.Option("float16", "--dtype", help="float16 or bfloat16."),
    group_size: int = typer.Option(128, "--group-size", help="32, 64, 128 or -1."),
    gpu: str | None = typer.Option(None, "--gpu", help=f"{', '.join(GPUS)}; default: the GPU here, else h100."),
    every: bool = typer.Option(False, "--all", help="Every configuration, with the reason against those that are out."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: every configuration."),
) -> None:
    """Show which kernel and tile run a shape, the estimated time, the floor, and the runners-up.

    The floor is the larger of bytes over the memory bandwidth and operations over the tensor cores' rate, both by data
    sheet: no kernel is faster.

    \b
    Examples:
      marlin kernels explain 16 4096 4096
      marlin kernels explain 1 28672 8192 --kind w4a16_dense --gpu a100 --all
    """
    from marlin.runtime import Problem
    from marlin.runtime.explain import explain as explain_problem
    from marlin.settings import batch_invariant

    found = explain_problem(Problem(m, n, k, group_size, dtype, kind, batch_invariant()), gpu_here_or(gpu))
    if as_json:
        print_json(found.as_dict())
        return
    plan, floor = found.plan, found.floor
    console = out()
    console.print(f"{kind} M={m} N={n} K={k} group_size={group_size} {dtype} on {plan.device.name}", soft_wrap=True)
    if plan.problem.batch_invariant:
        console.print("batch-invariant mode (MARLIN_BATCH_INVARIANT=1): one order of additions for every M")
    blocks = f"{found.grid} blocks of {found.variant.threads} threads, workspace {found.workspace_bytes} bytes"
    console.print(f"runs {found.variant.entry}: {blocks}", soft_wrap=True)
    if plan.expansion is not None:
        slabs = f"{len(plan.expansion.slabs)} times, {plan.expansion.slab_rows} rows at most"
        console.print(f"{slabs}; cuBLAS multiplies them")
    share = f"{100 * floor.us / found.estimate_us:.0f} %"
    times = f"memory {floor.memory_us:.1f}, tensor cores {floor.tensor_us:.1f}"
    console.print(f"estimate {found.estimate_us:.1f} us; floor {floor.us:.1f} us ({times}), {share} of the estimate")
    rows = found.order if every else (found.chosen, *found.runners_up[:RUNNERS_UP])
    table = Table("kernel", "tile", "estimate", "", box=None, pad_edge=False)
    for row in rows:
        over = "" if row.us is None else f"{row.us / found.estimate_us:.2f} times"
        verdict = "chosen" if row == found.chosen else over or str(row.reason)
        table.add_row(row.kernel or "-", row.config, "-" if row.us is None else f"{row.us:.1f} us", verdict)
    console.width = max(console.width, 130)
    console.print(table)
    hidden = len(found.order) - len(rows)
    if hidden:
        console.print(f"{hidden} more with --all")
