"""Figures from the records: `python -m benchmarks.figures`, SVG files in docs/figures/.

Owns two drawings: speedup over cuBLAS against the batch size, for the block and for one large matrix, and speedup per
layer at batch 16. The same record gives the same bytes. Needs matplotlib; knows no GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import presets, records, report
from benchmarks.report import BASELINE, LABELS, OURS, Impl, Rows

# Fixed per implementation, so that a colour means the same in every figure; distinct in lightness too.
COLOURS: dict[Impl, str] = {
    OURS: "#c2410c",
    ("marlin", "w4a16_dense"): "#1d4ed8",
    ("sparse-marlin", "w4a16_sp24"): "#f59e6c",
    ("marlin-published", "w4a16_dense"): "#7da2f0",
    ("cusparselt", "fp16_sp24"): "#15803d",
    ("gemlite", "w4a16_dense"): "#a78bca",
    ("humming", "w4a16_dense"): "#52525b",
}
_STYLE = {
    "svg.hashsalt": "marlin",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _name(impl: Impl) -> str:
    label = LABELS.get(impl, " ".join(impl))
    return label.replace("**", "") + (" (this project)" if impl[0] == "marlin" else "")


def _impls(rows: Rows) -> list[Impl]:
    seen = {(row["impl"], row["op"]) for row in rows}
    return [impl for impl in LABELS if impl in seen]


def speedups(rows: Rows, shapes: Sequence[tuple[int, int]]) -> dict[Impl, list[tuple[int, float]]]:
    """Per implementation, (M, speedup over cuBLAS) of the sum over shapes, for every M measured."""
    lines: dict[Impl, list[tuple[int, float]]] = {}
    for m in sorted({row["m"] for row in rows}):
        sums = report.block_sums(rows, shapes, m)
        for impl in [impl for impl in sums if BASELINE in sums and impl != BASELINE]:
            lines.setdefault(impl, []).append((m, sums[BASELINE]["us"] / sums[impl]["us"]))
    return lines


def largest(rows: Rows) -> tuple[int, int]:
    """The (N, K) with the most weights, the highest N among equals."""
    return max({(row["n"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _draw_lines(axes: Any, rows: Rows, shapes: Sequence[tuple[int, int]], title: str) -> None:
    lines = speedups(rows, shapes)
    for impl in [impl for impl in LABELS if impl in lines]:
        points = lines[impl]
        ours = impl[0] == "marlin"
        axes.plot(
            [m for m, _ in points],
            [times for _, times in points],
            color=COLOURS[impl],
            linewidth=2.2 if ours else 1.3,
            marker="o" if ours else ".",
            markersize=4 if ours else 5,
            label=_name(impl),
            zorder=3 if ours else 2,
        )
    batches = sorted({m for points in lines.values() for m, _ in points})
    axes.axhline(1.0, color="#737373", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(m) for m in batches], rotation=45 if len(batches) > 8 else 0)
    axes.minorticks_off()
    axes.set_xlabel("batch size M (tokens)")
    axes.set_title(title, loc="left", fontsize=9)


def _where(record: dict[str, Any], what: str) -> str:
    return f"{record['gpu']}{what}, group size 128, cold weights, {record['date']}"


def _save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, bbox_inches="tight", dpi=160)
    plt.close(figure)


def draw_batches(record: dict[str, Any], path: pathlib.Path) -> None:
    """Speedup against M: the block on the left, the largest matrix of the record on the right."""
    rows = report.select(record["rows"], dtype="float16", group_size=128)
    rows = [row for row in rows if row["m"] in presets.BATCHES]
    n, k = largest(rows)
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True)
        _draw_lines(left, rows, presets.BLOCK, f"decoder block of {presets.BLOCK_NAME}, sum of four layers")
        _draw_lines(right, rows, [(n, k)], f"one layer, N={n} K={k}")
        top = max(times for axes in (left, right) for line in axes.get_lines() for times in line.get_ydata())
        left.set_ylim(0, 1.06 * top)
        left.set_ylabel("speedup over cuBLAS fp16")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.04))
        figure.suptitle(_where(record, ""), x=0.06, ha="left", fontsize=10)
        _save(figure, path)


def draw_layers(record: dict[str, Any], path: pathlib.Path, m: int = 16) -> None:
    """Speedup per layer at one batch size, as bars; the block and up to eight other layers."""
    rows = report.select(record["rows"], dtype="float16", group_size=128, m=m)
    measured = dict.fromkeys((row["n"], row["k"]) for row in rows)
    shapes = [shape for shape in presets.BLOCK if shape in measured]
    shapes += [shape for shape in sorted(measured, key=lambda s: s[0] * s[1]) if shape not in shapes][:8]
    impls = _impls(rows)
    width = 0.84 / max(len(impls), 1)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(max(6.4, 1.5 * len(shapes)), 3.4))
        for index, impl in enumerate(impls):
            found = [dict(speedups(rows, [shape]).get(impl, [])).get(m, 0.0) for shape in shapes]
            places = [place + (index - (len(impls) - 1) / 2) * width for place in range(len(shapes))]
            bars = axes.bar(places, found, width * 0.92, color=COLOURS[impl], label=_name(impl))
            if impl == OURS:
                axes.bar_label(bars, fmt="%.1fx", fontsize=8, padding=2)
        axes.axhline(1.0, color="#737373", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(shapes)), [f"{n} x {k}" for n, k in shapes])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("speedup over cuBLAS fp16")
        axes.set_xlabel("N x K")
        axes.set_title(_where(record, f", batch {m}"), loc="left", fontsize=10)
        figure.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.0))
        _save(figure, path)


def pick(found: list[dict[str, Any]], gpu: str | None) -> dict[str, Any] | None:
    """The record whose GPU's name contains gpu, or the newest."""
    fitting = [record for record in found if gpu is None or gpu.lower() in record["gpu"].lower()]
    return max(fitting, key=lambda record: str(record["date"]), default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 1 where there is no record to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--gpu", help="part of a GPU's name; default: the newest record")
    parser.add_argument("--folder", type=pathlib.Path, default=records.ROOT / "docs" / "figures")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    record = pick(records.read_all("gemm"), args.gpu)
    if record is None or not record["rows"]:
        print("benchmarks.figures: a gemm record is needed; got none. Measure with `make gpu`.", file=sys.stderr)
        return 1
    for name, draw in (("speedup-batch", draw_batches), ("speedup-layers", draw_layers)):
        path = args.folder / f"{name}.{args.format}"
        draw(record, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
