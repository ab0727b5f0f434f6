"""Tables and figures from the records: `python -m benchmarks.report [--update | --check] FILE...`.

Owns the Markdown between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, for the NAMEs of `TABLES`, and whether the
figures that it refers to are those of the records. Numbers come from `benchmarks/records/` alone. Needs no GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import cliffs, figures, presets, records, serving_tables
from benchmarks.quality_data import DEMO
from benchmarks.records import ROOT
from benchmarks.rows import (
    BASELINE,
    FEW,
    GROUP_SIZE,
    OURS,
    PORTABLE,
    Impl,
    Rows,
    block_sums,
    label,
    ordered,
    pick,
    select,
    without,
)
from marlin.errors import message
from marlin.runtime.config import all_configs
from marlin.runtime.problem import KINDS

_LAYER_M = presets.LAYER_BATCH
_STALE = "> **Stale**: measured with earlier kernels than those in this tree. Measure again with `make gpu`."
_NOTHING = "No record yet. Measure with `make gpu`."
_NO_HOST = "No record yet. Measure with `marlin bench host`."
_NO_SUSTAINED = "No record yet. Measure with `marlin bench sustained`."
_NO_DECODE = "No record yet. Measure with `marlin bench decode`."
_PORTABLE_NOTE = (
    "What GPUs without kernels of their own run, measured on a GPU that has some: the portable kernels, or, for many "
    "tokens, one that expands the weight for cuBLAS ([kernels.md](kernels.md#expanded-products)). fp16:"
)
_NO_SERVING = "No record yet. Measure with `python -m benchmarks.serving`."
_MARKER = re.compile(r"<!-- bench:([a-z0-9-]+) -->\n(.*?)<!-- /bench:\1 -->", re.DOTALL)
_ANY_MARKER = re.compile(r"<!-- /?bench:([^ ]*) -->")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def caption(record: dict[str, Any]) -> str:
    """Where the numbers come from, and whether they are current."""
    versions = f"driver {record['driver']}, CUDA {record['cuda']}, torch {record['torch']}"
    text = f"{record['gpu']}, {versions}, {record['date']}."
    return "\n\n".join([text, *([_STALE] if records.is_stale(record) else []), *_retired(record)])


def _retired(record: dict[str, Any]) -> list[str]:
    """A sentence where rows name tiles that are no longer built: the record's hash covers the kernels' text alone."""
    tags = {config.tag for kind in KINDS for config in all_configs(kind)}
    ours = [row["config"] for row in record["rows"] if row.get("impl") == "marlin" and row.get("config")]
    named = [config.split()[-1] for config in ours if "cuBLAS" not in config]
    retired = sum(tag not in tags for tag in named)
    return [f"{retired} of {len(named)} times of our kernels are of tiles that are no longer built."] if retired else []


def _speed_line(name: str, sums: dict[Impl, dict[str, float]], columns: list[Impl]) -> list[str]:
    base = sums[BASELINE]["us"]
    cells = [f"{base / sums[impl]['us']:.2f}x" if impl in sums else "-" for impl in columns]
    ours = sums.get(OURS)
    mine = [f"{ours['us']:.1f}", f"{100 * ours['floor_us'] / ours['us']:.0f} %"] if ours else ["-", "-"]
    return [name, f"{base:.1f}", *cells, *mine]


def speed_table(first: str, points: Iterable[tuple[str, dict[Impl, dict[str, float]]]]) -> str:
    """cuBLAS us, each implementation's speedup over it, and us and share of the floor of 2:4 INT4."""
    kept = [(name, sums) for name, sums in points if BASELINE in sums and len(sums) > 1]
    if not kept:
        return _NOTHING
    columns = ordered(impl for _, sums in kept for impl in sums)
    header = [first, "cuBLAS, µs", *map(label, columns), "2:4 INT4, µs", "of the floor"]
    return table(header, [_speed_line(name, sums, columns) for name, sums in kept])


def _each_gpu(body: Callable[[Rows], str]) -> str:
    found = records.read_all("gemm")
    parts = [f"{caption(record)}\n\n{body(select(record['rows'], group_size=GROUP_SIZE))}" for record in found]
    return "\n\n".join(parts) or _NOTHING


def _block(dtype: str) -> str:
    def body(rows: Rows) -> str:
        rows = without(select(rows, dtype=dtype), *PORTABLE)
        return speed_table("M", [(str(m), block_sums(rows, presets.BLOCK, m)) for m in presets.BATCHES])

    return _each_gpu(body)


def _portable() -> str:
    """What GPUs without kernels of their own run, measured on this one; nothing where the record has no such rows."""
    parts = []
    for record in records.read_all("gemm"):
        rows = select(record["rows"], group_size=GROUP_SIZE, dtype="float16")
        lines = [line for m in presets.ALL_BATCHES if (line := _portable_line(rows, m))]
        if lines:
            header = ["M", "cuBLAS, µs"]
            for impl in PORTABLE:
                header += [label(impl), "expanded layers"]
            parts.append(f"{caption(record)}\n\n{table(header, lines)}")
    return "\n\n".join([_PORTABLE_NOTE, *parts] if parts else [])


def _portable_line(rows: Rows, m: int) -> list[str]:
    """Speedups over cuBLAS, and how many layers cuBLAS multiplies after they are expanded; empty without any."""
    sums = block_sums(rows, presets.BLOCK, m)
    if BASELINE not in sums or not any(impl in sums for impl in PORTABLE):
        return []
    cells = [str(m), f"{sums[BASELINE]['us']:.1f}"]
    for impl in PORTABLE:
        if impl not in sums:
            cells += ["-", "-"]
            continue
        ran = [row["config"] for row in select(rows, impl=impl[0], op=impl[1], m=m)]
        expanded = sum("cuBLAS" in (config or "") for config in ran)
        cells += [f"{sums[BASELINE]['us'] / sums[impl]['us']:.2f}x", f"{expanded} of {len(ran)}"]
    return cells


def _layers() -> str:
    def body(rows: Rows) -> str:
        rows = without(select(rows, dtype="float16", m=_LAYER_M), *FEW)
        shapes = dict.fromkeys((row["n"], row["k"]) for row in rows)
        return speed_table("N x K", [(f"{n} x {k}", block_sums(rows, [(n, k)], _LAYER_M)) for n, k in shapes])

    return _each_gpu(body)


def _models() -> str:
    def body(rows: Rows) -> str:
        rows = without(select(rows, dtype="float16"), *FEW)
        points = [
            (f"{name}, M={m}", block_sums(rows, [(layer.n, layer.k) for layer in layers], m))
            for name, layers in presets.PRESETS.items()
            for m in (1, 16, 64, 256, 4096)
        ]
        return speed_table("decoder block", points)

    return _each_gpu(body)


def _cliffs() -> str:
    def body(rows: Rows) -> str:
        return "\n".join(f"- {line}" for line in cliffs.lines(rows)) or _NOTHING

    return _each_gpu(body)


def _sustained_line(row: dict[str, Any], base: float | None) -> list[str]:
    load = row["load"]
    means = [f"{load[name]['mean']:.0f}" if load.get(name) else "-" for name in ("sm_mhz", "power_w", "temperature_c")]
    limits = ", ".join(f"{what} {100 * share:.0f} %" for what, share in load["limited_by"].items()) or "-"
    speedup = f"{base / row['us']:.2f}x" if base else "-"
    name = label((row["impl"], row["op"])) if row["impl"] != "cublas" else "cuBLAS fp16"
    times = [f"{row['us']:.1f}", f"{row['first_us']:.1f}", speedup, f"{row['weight_gb_per_s']:.0f}"]
    return [presets.LABELS[row["model"]], name, *times, *means, limits]


def _sustained() -> str:
    header = ("model", "", "µs a block", "at first", "speedup", "weight GB/s", "MHz", "W", "°C", "held down by")
    parts = []
    for record in records.read_all("sustained"):
        base = {row["model"]: row["us"] for row in record["rows"] if row["impl"] == "cublas"}
        lines = [_sustained_line(row, base.get(row["model"])) for row in record["rows"]]
        seconds = min((row["seconds"] for row in record["rows"]), default=0.0)
        note = f"Batch {_LAYER_M}, each line at least {seconds:.0f} s without a pause."
        parts.append(f"{caption(record)} {note}\n\n{table(header, lines)}")
    return "\n\n".join(parts) or _NO_SUSTAINED


def _decode() -> str:
    header = (
        "batch",
        "weights",
        "ms a step",
        "tokens/s",
        "speedup",
        "linear",
        "lm_head",
        "attention",
        "glue",
        "between",
    )
    parts = []
    for record in records.read_all("decode"):
        rows = record["rows"]
        base = {row["batch"]: row["ms_per_step"] for row in rows if row["op"] == "fp16"}
        lines = [
            [
                str(row["batch"]),
                "fp16" if row["op"] == "fp16" else label((row["impl"], row["op"])),
                f"{row['ms_per_step']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{base[row['batch']] / row['ms_per_step']:.2f}x",
                *(f"{row['parts_ms'][name]:.2f}" for name in header[5:]),
            ]
            for row in rows
        ]
        shape = f"{rows[0]['layers']} layers, {rows[0]['context']} tokens of context" if rows else ""
        parts.append(f"{caption(record)} {shape}; small operations {record['glue']}.\n\n{table(header, lines)}")
    return "\n\n".join(parts) or _NO_DECODE


def _serving() -> str:
    found = [record for record in records.read_all("serving") if record["rows"]]
    return "\n\n".join(f"{caption(record)}\n\n{serving_tables.render(record)}" for record in found) or _NO_SERVING


def _figures(prefix: str) -> Callable[[], str]:
    def make() -> str:
        parts, stale = [], False
        for name, (data, _, text) in figures.FIGURES.items():
            record = pick(records.read_all("sustained" if name.endswith("sustained") else "gemm"))
            if record is not None and data(None) is not None:
                parts.append(f"![{text}]({prefix}{name}.svg)")
                stale |= records.is_stale(record)
        return "\n\n".join([*parts, *([_STALE] if stale else [])]) or _NOTHING

    return make


def _ceilings() -> str:
    lines = [
        [
            record["gpu"],
            *(f"{record['ceilings'][name] / 1e9:.0f}" for name in ("read_bytes_per_s", "copy_bytes_per_s")),
            f"{record['ceilings']['flops_per_s'] / 1e12:.0f}",
        ]
        for record in records.read_all("gemm")
    ]
    header = ("GPU", "read, GB/s", "copy, GB/s", "dense fp16, TFLOP/s")
    return table(header, lines) if lines else _NOTHING


def _host() -> str:
    parts = []
    for record in records.read_all("host"):
        modes = list(dict.fromkeys(row["mode"] for row in record["rows"]))
        calls: dict[tuple[str, str], dict[str, float]] = {}
        for row in record["rows"]:
            calls.setdefault((row["impl"], row["call"]), {})[row["mode"]] = row["us"]
        lines = [[name, impl, *(f"{times[mode]:.1f}" for mode in modes)] for (impl, name), times in calls.items()]
        text = f"{record['gpu']}, torch {record['torch']}, Python {record['python']}, {record['date']}. Microseconds."
        parts.append(f"{text}\n\n{table(('call', 'of', *modes), lines)}")
    return "\n\n".join(parts) or _NO_HOST


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _quality(demo: bool) -> str:
    """Of the demo's model, or of all others."""
    header = ("model", "method", "recipe", "wiki ppl", "news ppl", "bits per weight", "s", "device", "peak GiB")
    lines = [
        [
            row["model"],
            row["method"],
            row["recipe"],
            _number(row["wiki"], ".2f"),
            _number(row["news"], ".2f"),
            _number(row["bits_per_weight"], ".2f"),
            _number(row["seconds"], ".0f"),
            row["device"],
            _number(row["peak_memory_gib"], ".1f"),
        ]
        for record in records.read_all("quality")
        for row in record["rows"]
        if (row["model"] == DEMO) == demo
    ]
    return table(header, lines) if lines else _NOTHING


TABLES: dict[str, Callable[[], str]] = {
    "block": lambda: _block("float16"),
    "block-bfloat16": lambda: _block("bfloat16"),
    "portable": _portable,
    "layers": _layers,
    "models": _models,
    "cliffs": _cliffs,
    "sustained": _sustained,
    "decode": _decode,
    "serving": _serving,
    # As seen from the root, and from docs/.
    "figures": _figures("docs/figures/"),
    "figures-docs": _figures("figures/"),
    "ceilings": _ceilings,
    "host": _host,
    "quality": lambda: _quality(True),
    "quality-others": lambda: _quality(False),
}


def render(text: str, name: str = "text") -> str:
    """text with what stands between the markers replaced. Raises: ValueError (unknown or unpaired marker)."""
    unknown = sorted({found for found in _ANY_MARKER.findall(text)} - set(TABLES))
    if unknown:
        known = ", ".join(TABLES)
        raise ValueError(message("benchmarks.report", f"{name}: a marker must be one of {known}", ", ".join(unknown)))
    if 2 * len(_MARKER.findall(text)) != len(_ANY_MARKER.findall(text)):
        fix = "Write <!-- bench:NAME --> and <!-- /bench:NAME -->, each on its own line."
        raise ValueError(message("benchmarks.report", f"{name}: every marker must have its end", "one without", fix))
    return _MARKER.sub(lambda hit: f"<!-- bench:{hit[1]} -->\n{TABLES[hit[1]]()}\n<!-- /bench:{hit[1]} -->", text)


def _behind_figures(write: bool) -> int:
    """How many figures were not those of the records; with write they are drawn. Raises: ImportError."""
    found = figures.behind()
    for name, data in found.items():
        path = figures.FOLDER / f"{name}.svg"
        if write:
            figures.save(name, data, path)
            print(f"{path}: drawn")
        else:
            print(f"{path}: out of date; run make bench-report")
    return len(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 when --check finds something out of date, 2 on a bad marker or a missing file."""
    parser = argparse.ArgumentParser(prog="marlin bench report", description=__doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="Markdown files; none: print every table")
    parser.add_argument("--update", action="store_true", help="write the files (the default)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    args = parser.parse_args(argv)
    if not args.files:
        for name, make in TABLES.items():
            print(f"## {name}\n\n{make()}\n")
        return 0
    behind = 0
    for path in args.files:
        try:
            old = (path if path.is_absolute() or path.exists() else ROOT / path).read_text()
            new = render(old, str(path))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        if new == old:
            continue
        behind += 1
        if args.check:
            print(f"{path}: out of date; run python -m benchmarks.report --update {path}")
        else:
            path.write_text(new)
            print(f"{path}: updated")
    try:
        behind += _behind_figures(write=not args.check)
    except ImportError as error:
        print(f"benchmarks.report: drawing figures needs matplotlib; got {error}.", file=sys.stderr)
        return 2
    return 1 if args.check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
