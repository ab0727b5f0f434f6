"""Tables from the records: `python -m benchmarks.report [--update | --check] FILE...`.

Owns the Markdown between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, for the NAMEs of `TABLES`. Numbers come
from `benchmarks/records/` alone. Needs no GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import presets, records
from benchmarks.records import ROOT
from marlin.errors import message

Rows = list[dict[str, Any]]
Impl = tuple[str, str]

BASELINE: Impl = ("cublas", "fp16")
LABELS: dict[Impl, str] = {
    ("marlin", "w4a16_sp24"): "**2:4 INT4**",
    ("marlin", "w4a16_dense"): "**INT4**",
    ("sparse-marlin", "w4a16_sp24"): "published Sparse-Marlin, 2:4 INT4",
    ("marlin-published", "w4a16_dense"): "published Marlin, INT4",
    ("cusparselt", "fp16_sp24"): "cuSPARSELt, 2:4 fp16",
    ("gemlite", "w4a16_dense"): "GemLite, INT4",
    ("humming", "w4a16_dense"): "Humming, INT4",
}
OURS: Impl = ("marlin", "w4a16_sp24")
_GROUP_SIZE, _LAYER_M = 128, 16
_STALE = "> **Stale**: measured with earlier kernels than those in this tree. Measure again with `make gpu`."
_NOTHING = "No record yet. Measure with `make gpu`."
_MARKER = re.compile(r"<!-- bench:([a-z0-9-]+) -->\n(.*?)<!-- /bench:\1 -->", re.DOTALL)
_ANY_MARKER = re.compile(r"<!-- /?bench:([^ ]*) -->")


def select(rows: Rows, **want: Any) -> Rows:
    """Rows whose fields have the values wanted."""
    return [row for row in rows if all(row[name] == value for name, value in want.items())]


def block_sums(rows: Rows, shapes: Iterable[tuple[int, int]], m: int) -> dict[Impl, dict[str, float]]:
    """Sums of us and floor_us over the shapes at m; implementations that lack a shape are left out."""
    shapes = list(shapes)
    sums: dict[Impl, dict[str, float]] = {}
    for impl in dict.fromkeys((row["impl"], row["op"]) for row in rows):
        found = [select(rows, impl=impl[0], op=impl[1], m=m, n=n, k=k) for n, k in shapes]
        if all(found):
            sums[impl] = {name: sum(min(row[name] for row in hits) for hits in found) for name in ("us", "floor_us")}
    return sums


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _columns(sums: Iterable[dict[Impl, dict[str, float]]]) -> list[Impl]:
    seen = {impl for one in sums for impl in one}
    return [impl for impl in LABELS if impl in seen] + sorted(seen - set(LABELS) - {BASELINE})


def _label(impl: Impl) -> str:
    return LABELS.get(impl, f"{impl[0]} {impl[1]}")


def caption(record: dict[str, Any]) -> str:
    """Where the numbers come from, and whether they are current."""
    versions = f"driver {record['driver']}, CUDA {record['cuda']}, torch {record['torch']}"
    text = f"{record['gpu']}, {versions}, {record['date']}."
    return f"{text}\n\n{_STALE}" if records.is_stale(record) else text


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
    columns = _columns(sums for _, sums in kept)
    header = [first, "cuBLAS, µs", *map(_label, columns), "2:4 INT4, µs", "of the floor"]
    return table(header, [_speed_line(name, sums, columns) for name, sums in kept])


def _each_gpu(body: Callable[[Rows], str]) -> str:
    found = records.read_all("gemm")
    parts = [f"{caption(record)}\n\n{body(select(record['rows'], group_size=_GROUP_SIZE))}" for record in found]
    return "\n\n".join(parts) or _NOTHING


def _block(dtype: str) -> str:
    def body(rows: Rows) -> str:
        rows = select(rows, dtype=dtype)
        return speed_table("M", [(str(m), block_sums(rows, presets.BLOCK, m)) for m in presets.BATCHES])

    return _each_gpu(body)


def _layers() -> str:
    def body(rows: Rows) -> str:
        rows = select(rows, dtype="float16", m=_LAYER_M)
        shapes = dict.fromkeys((row["n"], row["k"]) for row in rows)
        return speed_table("N x K", [(f"{n} x {k}", block_sums(rows, [(n, k)], _LAYER_M)) for n, k in shapes])

    return _each_gpu(body)


def _models() -> str:
    def body(rows: Rows) -> str:
        rows = select(rows, dtype="float16")
        points = [
            (f"{name}, M={m}", block_sums(rows, [(layer.n, layer.k) for layer in layers], m))
            for name, layers in presets.PRESETS.items()
            for m in (1, 16, 64, 256, 4096)
        ]
        return speed_table("decoder block", points)

    return _each_gpu(body)


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


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _quality() -> str:
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
    ]
    return table(header, lines) if lines else _NOTHING


TABLES: dict[str, Callable[[], str]] = {
    "block": lambda: _block("float16"),
    "block-bfloat16": lambda: _block("bfloat16"),
    "layers": _layers,
    "models": _models,
    "ceilings": _ceilings,
    "quality": _quality,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 when --check finds text out of date, 2 on a bad marker or a missing file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
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
    return 1 if args.check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
