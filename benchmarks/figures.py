"""Figures from the records: `marlin bench figures`, SVG files in docs/figures/.

Owns three drawings: speedup over cuBLAS against the batch size, for a decoder block and for one large matrix; speedup
on the layers of popular models at batch 16; the same when each model's layers run back to back for long. What is drawn
is worked out first, as plain data; its digest stands in the file, so that a figure that is behind its record is found
without drawing (`benchmarks.report --check`). Colours are readable on light and on dark pages. Drawing needs
matplotlib; nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import presets, records
from benchmarks.rows import (
    BASELINE,
    FEW,
    GROUP_SIZE,
    LABELS,
    OURS,
    Impl,
    Rows,
    block_sums,
    ordered,
    pick,
    select,
    without,
)

FOLDER = records.ROOT / "docs" / "figures"
# Changes when the drawing does, so that old files count as behind.
LOOK = 1
# (colour, marker, line style) per implementation, the same in every figure.
LOOKS: dict[Impl, tuple[str, str, str]] = {
    OURS: ("#e8590c", "o", "-"),
    ("marlin", "w4a16_dense"): ("#2b7fe0", "s", "-"),
    ("sparse-marlin", "w4a16_sp24"): ("#b98209", "^", "--"),
    ("marlin-published", "w4a16_dense"): ("#7680d9", "v", "--"),
    ("cusparselt", "fp16_sp24"): ("#2f9e44", "D", "-."),
    ("gemlite", "w4a16_dense"): ("#c255b5", "P", ":"),
    ("humming", "w4a16_dense"): ("#1098ad", "X", ":"),
}
_OTHER = ("#868e96", ".", ":")
INK = "#757b84"
_STYLE = {
    "svg.hashsalt": "marlin",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
Data = dict[str, Any]


def _name(impl: Impl) -> str:
    text = LABELS.get(impl, " ".join(impl)).replace("**", "")
    return text + (" (this project)" if impl[0] == "marlin" else "")


def _key(impl: Impl) -> str:
    return "/".join(impl)


def speedups(rows: Rows, shapes: Sequence[tuple[int, int]]) -> dict[Impl, list[tuple[int, float]]]:
    """Per implementation, (M, speedup over cuBLAS) of the sum over shapes, for every M measured.

    Without those that are measured at few points.
    """
    rows = without(rows, *FEW)
    lines: dict[Impl, list[tuple[int, float]]] = {}
    for m in sorted({row["m"] for row in rows}):
        sums = block_sums(rows, shapes, m)
        for impl in [impl for impl in sums if BASELINE in sums and impl != BASELINE]:
            lines.setdefault(impl, []).append((m, sums[BASELINE]["us"] / sums[impl]["us"]))
    return lines


def largest(rows: Rows) -> tuple[int, int]:
    """The (N, K) with the most weights of those measured at the most batch sizes, the highest N among equals."""
    batches: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        batches.setdefault((row["n"], row["k"]), set()).add(row["m"])
    most = max(len(found) for found in batches.values())
    full = [shape for shape, found in batches.items() if len(found) == most]
    return max(full, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _panel(rows: Rows, shapes: Sequence[tuple[int, int]], title: str) -> Data:
    lines = speedups(rows, shapes)
    return {
        "title": title,
        "lines": [
            {"impl": _key(impl), "points": [[m, round(times, 3)] for m, times in lines[impl]]}
            for impl in ordered(lines)
        ],
    }


def _where(record: Data, what: str) -> str:
    return f"{record['gpu']}{what}, group size {GROUP_SIZE}, {record['date']}"


def batch_data(gpu: str | None = None) -> Data | None:
    """Speedup against M: the block, and a large matrix; None without a record."""
    record = pick(records.read_all("gemm"), gpu)
    rows = [] if record is None else select(record["rows"], dtype="float16", group_size=GROUP_SIZE)
    rows = [row for row in rows if row["m"] in presets.BATCHES]
    if record is None or not rows:
        return None
    n, k = largest(rows)
    panels = [
        _panel(rows, presets.BLOCK, f"decoder block of {presets.LABELS[presets.BLOCK_NAME]}, sum of four layers"),
        _panel(rows, [(n, k)], f"one large matrix, N={n} K={k}"),
    ]
    panels = [panel for panel in panels if panel["lines"]]
    return {"title": _where(record, ", cold weights"), "panels": panels} if panels else None


def _model_label(model: str) -> str:
    same = [presets.LABELS[name] for name, layers in presets.PRESETS.items() if layers == presets.PRESETS[model]]
    return "\n".join(same)


def models_data(gpu: str | None = None) -> Data | None:
    """Speedup on the linear layers of a decoder block of each model, at one batch size; None without a record."""
    record, m = pick(records.read_all("gemm"), gpu), presets.LAYER_BATCH
    if record is None:
        return None
    rows = select(record["rows"], dtype="float16", group_size=GROUP_SIZE, m=m)
    groups = []
    for model in presets.distinct(presets.PRESETS):
        lines = speedups(rows, [(layer.n, layer.k) for layer in presets.PRESETS[model]])
        if lines:
            bars = {_key(impl): round(lines[impl][0][1], 3) for impl in ordered(lines)}
            groups.append({"name": _model_label(model), "bars": bars})
    return {"title": _where(record, f", batch {m}, cold weights"), "groups": groups} if groups else None


def sustained_data(gpu: str | None = None) -> Data | None:
    """Speedup while each model's layers run back to back; None without a record."""
    record, m = pick(records.read_all("sustained"), gpu), presets.LAYER_BATCH
    rows = [] if record is None else select(record["rows"], m=m, group_size=GROUP_SIZE)
    groups = []
    for model in [model for model in presets.PRESETS if any(row["model"] == model for row in rows)]:
        found = {(row["impl"], row["op"]): row for row in rows if row["model"] == model}
        if BASELINE not in found or len(found) < 2:
            continue
        bars = {_key(impl): round(found[BASELINE]["us"] / found[impl]["us"], 3) for impl in ordered(found)}
        clocks = [_clock(found[impl]) for impl in (BASELINE, *ordered(found)[:1])]
        note = f"\n{' / '.join(clocks)} MHz" if all(clocks) else ""
        groups.append({"name": _model_label(model) + note, "bars": bars})
    if record is None or not groups:
        return None
    seconds = min(row["seconds"] for row in rows)
    title = _where(record, f", batch {m}, back to back for {seconds:.0f} s each")
    return {"title": title, "note": "below each model: mean clock under cuBLAS / under the first bar", "groups": groups}


def _clock(row: Data) -> str:
    found = row["load"].get("sm_mhz")
    return f"{found['mean']:.0f}" if found else ""


def digest(data: Data) -> str:
    """What a file drawn from data carries."""
    return hashlib.sha256(json.dumps([LOOK, data], sort_keys=True).encode()).hexdigest()[:16]


def _plt() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _look(key: str) -> tuple[str, str, str]:
    impl, _, op = key.partition("/")
    return LOOKS.get((impl, op), _OTHER)


def _label_of(key: str) -> str:
    impl, _, op = key.partition("/")
    return _name((impl, op))


def _draw_panel(axes: Any, panel: Data) -> None:
    for line in panel["lines"]:
        colour, marker, style = _look(line["impl"])
        ours = line["impl"].startswith("marlin/")
        batches, times = zip(*line["points"], strict=True)
        width, size = (2.4, 5) if ours else (1.3, 4)
        look = {"color": colour, "marker": marker, "linestyle": style, "linewidth": width, "markersize": size}
        axes.plot(batches, times, **look, label=_label_of(line["impl"]), zorder=3 if ours else 2)
    ticks = sorted({m for line in panel["lines"] for m, _ in line["points"]})
    axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(m) for m in ticks], rotation=45 if len(ticks) > 7 else 0)
    axes.minorticks_off()
    axes.set_xlabel("batch size M (tokens)")
    axes.set_title(panel["title"], loc="left", fontsize=9)


def draw_batches(data: Data) -> Any:
    """One panel of lines for each of data's."""
    count = len(data["panels"])
    figure, grid = _plt().subplots(1, count, figsize=(4.9 * count, 3.7), sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], data["panels"], strict=True):
        _draw_panel(axes, panel)
    grid[0][0].set_ylim(bottom=0)
    grid[0][0].set_ylabel("speedup over cuBLAS fp16")
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.04))
    figure.suptitle(data["title"], x=0.06, ha="left", fontsize=10)
    return figure


def draw_groups(data: Data) -> Any:
    """A group of bars for each model."""
    groups = data["groups"]
    keys = [_key(impl) for impl in LABELS if any(_key(impl) in group["bars"] for group in groups)]
    width = min(0.84 / max(len(keys), 1), 0.4)
    figure, axes = _plt().subplots(figsize=(max(6.4, 1.45 * len(groups)), 3.6))
    for index, key in enumerate(keys):
        places = [place + (index - (len(keys) - 1) / 2) * width for place in range(len(groups))]
        heights = [group["bars"].get(key, 0.0) for group in groups]
        bars = axes.bar(places, heights, width * 0.92, color=_look(key)[0], label=_label_of(key))
        if key == _key(OURS):
            axes.bar_label(bars, fmt="%.1fx", fontsize=8, padding=2, color=INK)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xticks(range(len(groups)), [group["name"] for group in groups], fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("speedup over cuBLAS fp16")
    axes.set_title(data["title"], loc="left", fontsize=10)
    if data.get("note"):
        axes.set_xlabel(data["note"], fontsize=8)
    figure.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.06 if data.get("note") else 0.0))
    return figure


# Name to (what is drawn, how, and the text in its place).
FIGURES: dict[str, tuple[Callable[[str | None], Data | None], Callable[[Data], Any], str]] = {
    "speedup-batch": (batch_data, draw_batches, "Speedup over cuBLAS fp16 against batch size"),
    "speedup-models": (models_data, draw_groups, "Speedup over cuBLAS fp16 on the layers of popular models"),
    "speedup-sustained": (sustained_data, draw_groups, "The same, sustained under load"),
}


def save(name: str, data: Data, path: pathlib.Path) -> None:
    """Draw a figure of `FIGURES`. The same data give the same bytes, with the same matplotlib."""
    plt = _plt()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"Description": f"data {digest(data)}"}
    if path.suffix == ".svg":
        metadata["Date"] = None
    with plt.rc_context(_STYLE):
        figure = FIGURES[name][1](data)
        figure.savefig(path, metadata=metadata, bbox_inches="tight", dpi=160, transparent=True)
        plt.close(figure)


def behind() -> dict[str, Data]:
    """The figures whose file in FOLDER is missing or drawn from other data, with the data to draw."""
    found = {}
    for name, (make, _, _) in FIGURES.items():
        data, path = make(None), FOLDER / f"{name}.svg"
        if data is not None and not (path.exists() and f"data {digest(data)}" in path.read_text(encoding="utf-8")):
            found[name] = data
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 1 where there is no record to draw."""
    parser = argparse.ArgumentParser(prog="marlin bench figures", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--gpu", help="part of a GPU's name; default: the newest record of each kind")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    drawn = 0
    for name, (make, _, _) in FIGURES.items():
        data = make(args.gpu)
        if data is None:
            what = "sustained" if name.endswith("sustained") else "gemm"
            print(f"{name}: no {what} record to draw from; measure with `marlin bench {what}`", file=sys.stderr)
            continue
        path = args.folder / f"{name}.{args.format}"
        save(name, data, path)
        print(path)
        drawn += 1
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
