"""`marlin doctor`: GPU, driver, compiler, versions, and a self-test of every implementation that can run here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from marlin.cli.common import EXIT_CHECK_FAILED, out, print_json

if TYPE_CHECKING:
    import torch

    from marlin.testing.cases import Case


@dataclass(frozen=True)
class Row:
    """One line of the report. ok: True, False, or None for something absent that is not a fault."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def _run_case(case: Case, device: torch.device) -> str | None:
    """Run one case through the op and check it against the oracle; the reason it failed, or None."""
    import torch

    import marlin.ops  # noqa: F401  (registers torch.ops.marlin)
    from marlin.formats.layouts import pack
    from marlin.testing import tolerance

    act, weight, bias = case.inputs()
    packed = pack(weight, case.dtype)
    moved = [t if t is None else t.to(device) for t in (act, packed.codes, packed.meta, packed.scales, bias)]
    arguments = [t for i, t in enumerate(moved) if i != 2 or packed.meta is not None]
    op = getattr(torch.ops.marlin, case.kind)
    try:
        result = op(*arguments, packed.n, packed.group_size)
        tolerance.check(result.cpu(), act, weight, bias, name=case.id)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def self_test(device: torch.device) -> Iterator[Row]:
    """The op on device against the float64 oracle, one row a kind and dtype."""
    import torch

    from marlin.testing.cases import Case

    for kind in ("w4a16_sp24", "w4a16_dense"):
        for dtype in (torch.float16, torch.bfloat16):
            shapes = ((1, 192, 576, 64), (17, 576, 1536, 128), (64, 256, 512, -1))
            cases = [Case(m, n, k, g, dtype, kind, "self-test", bias=m == 17) for m, n, k, g in shapes]
            started = time.perf_counter()
            reasons = [reason for case in cases if (reason := _run_case(case, device))]
            where = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
            name = f"self-test {kind} {str(dtype).removeprefix('torch.')}"
            if reasons:
                yield Row(name, False, f"{where}: {reasons[0]}", "Report it with the output of marlin doctor --json.")
            else:
                yield Row(name, True, f"{where}: {len(cases)} shapes in {time.perf_counter() - started:.1f} s")


def _checks() -> Iterator[Row]:
    import torch

    from marlin.runtime import driver
    from marlin.runtime.diagnose import diagnose

    # Why: without an NVIDIA driver everything still runs on the CPU, so what only a GPU needs is absent, not broken.
    optional = {"transformers"} if driver.driver_version() else {"transformers", "gpu"}
    for check in diagnose():
        yield Row(check.name, check.ok or (None if check.needed_for in optional else False), check.detail, check.fix)
    yield from self_test(torch.device("cpu"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(index) >= (8, 0):
                yield from self_test(torch.device("cuda", index))


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Check GPU, driver, compiler and versions, run a self-test, and say what to do about each problem.

    Exits with 1 when something fails.

    \b
    Examples:
      marlin doctor
      marlin doctor --json
    """
    rows: list[Row] = []
    console = out()
    for row in _checks():
        rows.append(row)
        if not as_json:
            mark = {True: "[green]ok  [/]", False: "[bold red]FAIL[/]", None: "[yellow]none[/]"}[row.ok]
            console.print(f"{mark} [bold]{escape(row.name)}[/]  {escape(row.detail)}", soft_wrap=True)
            if row.fix and row.ok is not True:
                console.print(f"       {escape(row.fix)}", soft_wrap=True)
    if as_json:
        print_json([row.__dict__ for row in rows])
    failed = sum(row.ok is False for row in rows)
    if not as_json:
        absent = sum(row.ok is None for row in rows)
        console.print(f"{len(rows) - failed - absent} checks passed, {failed} failed, {absent} absent")
    if failed:
        raise typer.Exit(EXIT_CHECK_FAILED)
