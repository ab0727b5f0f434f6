"""Tables of a serving record: time per output token, prompt rates, and where the time of a step goes, as Markdown.

Owns their form alone. Needs no GPU and no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# In the order of columns; the first is what the others are compared with.
KINDS = (
    "sparse_marlin",
    "pack-quantized",
    "none",
    "pack-quantized, marlin kernel",
    "sparse_marlin, vLLM norms",
)
_MODES = {"none": "vLLM's compilation off", "compile": "vLLM's compilation on, as it is by default"}
Row = dict[str, Any]


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def _compared(
    rows: Sequence[Row], head: str, field: str, form: str, point: Callable[[Row], str], inverse: bool
) -> str | None:
    """A line for each point, a column for each kind, then ours relative to each other kind; None without values."""
    rows = [row for row in rows if row[field] is not None]
    kinds = [kind for kind in KINDS if any(row["quantization"] == kind for row in rows)]
    ours, others = KINDS[0], [kind for kind in kinds if kind != KINDS[0]]
    if not kinds:
        return None
    ratios = [f"{ours} / {kind}" for kind in others] if ours in kinds else []
    lines = [[head, *kinds, *ratios]]
    for name in dict.fromkeys(map(point, rows)):
        found = {row["quantization"]: row[field] for row in rows if point(row) == name}
        cells = [form.format(found[kind]) if kind in found else "-" for kind in kinds]
        for kind in others if ratios else ():
            both = ours in found and kind in found
            cells.append(f"{found[ours] / found[kind]:.2f}{'' if inverse else 'x'}" if both else "-")
        lines.append([name, *cells])
    return _table(lines)


def speeds(rows: Sequence[Row]) -> str:
    """Time per output token, ms, and prompt tokens per second. A ratio of times below 1 is faster, of rates above 1."""
    fixed = {(row["prompt"], row["output"]) for row in rows if row["ms_per_output_token"] is not None}
    prompt, output = next(iter(fixed)) if len(fixed) == 1 else (None, None)
    label = f"ms a token, prompt {prompt}, output {output}: batch" if prompt else "ms a token: batch, prompt"
    one = (lambda row: str(row["batch"])) if prompt else (lambda row: f"{row['batch']}, {row['prompt']}")
    both = [_compared(rows, label, "ms_per_output_token", "{:.2f}", one, True)]
    where = lambda row: f"{row['batch']}, {row['prompt']}"  # noqa: E731
    both.append(_compared(rows, "prompt tokens/s: batch, prompt", "prefill_tokens_per_s", "{:.0f}", where, False))
    return "\n\n".join(filter(None, both))


def profiles(rows: Sequence[Row]) -> str:
    """GPU time of a decode step by class of kernels, us: a column for each quantization and batch."""
    labels = list(dict.fromkeys(one["class"] for row in rows for one in row["classes"]))
    lines = [["us a step", *(f"{row['quantization']}, batch {row['batch']}" for row in rows)]]
    for label in labels:
        found = [next((one for one in row["classes"] if one["class"] == label), None) for row in rows]
        lines.append([label, *("-" if one is None else f"{one['us_per_step']:.0f}" for one in found)])
    sums = [sum(one["us_per_step"] for one in row["classes"]) for row in rows]
    lines.append(["all kernels", *(f"{total:.0f}" for total in sums)])
    lines.append(["step, under the profiler", *(f"{row['step_us']:.0f}" for row in rows)])
    return _table(lines)


def render(record: dict[str, Any]) -> str:
    """All tables of a record, by compilation mode and number of GPUs."""
    parts = []
    mode_of = lambda row: row.get("mode", record["settings"].get("mode", "none"))  # noqa: E731
    rows, profiled = record["rows"], record.get("profiles", [])
    for mode, tp, version in dict.fromkeys((mode_of(row), row["tp"], row["version"]) for row in rows):
        here = lambda row, at=(mode, tp, version): (mode_of(row), row["tp"], row["version"]) == at  # noqa: E731
        gpus = "one GPU" if tp == 1 else f"{tp} GPUs"
        parts.append(f"vLLM {version}, {gpus}, {_MODES[mode]}.\n\n{speeds(list(filter(here, rows)))}")
        if found := list(filter(here, profiled)):
            text = "GPU time of a decode step, by what kernels do; kernels that overlap are counted in full."
            parts.append(f"{text}\n\n{profiles(found)}")
    return "\n\n".join(parts)
