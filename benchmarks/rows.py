"""Questions that tables and figures ask of records: which rows, whose sums, which record.

Owns the names under which implementations are shown and their order. Needs no GPU and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Rows = list[dict[str, Any]]
Impl = tuple[str, str]

BASELINE: Impl = ("cublas", "fp16")
OURS: Impl = ("marlin", "w4a16_sp24")
INVARIANT: Impl = ("marlin-batch-invariant", "w4a16_sp24")
# What a GPU without kernels of its own would run, on whatever GPU.
PORTABLE: tuple[Impl, Impl] = (("marlin-portable", "w4a16_sp24"), ("marlin-portable", "w4a16_dense"))
# Measured at few points, so left out of figures and of tables of other points.
FEW: tuple[Impl, ...] = (INVARIANT, *PORTABLE)
LABELS: dict[Impl, str] = {
    ("marlin", "w4a16_sp24"): "**2:4 INT4**",
    ("marlin", "w4a16_dense"): "**INT4**",
    INVARIANT: "2:4 INT4, batch-invariant",
    PORTABLE[0]: "2:4 INT4, portable kernels",
    PORTABLE[1]: "INT4, portable kernels",
    ("sparse-marlin", "w4a16_sp24"): "published Sparse-Marlin, 2:4 INT4",
    ("marlin-published", "w4a16_dense"): "published Marlin, INT4",
    ("cusparselt", "fp16_sp24"): "cuSPARSELt, 2:4 fp16",
    ("gemlite", "w4a16_dense"): "GemLite, INT4",
    ("humming", "w4a16_dense"): "Humming, INT4",
}
GROUP_SIZE = 128


def select(rows: Rows, **want: Any) -> Rows:
    """Rows whose fields have the values wanted."""
    return [row for row in rows if all(row[name] == value for name, value in want.items())]


def without(rows: Rows, *impls: Impl) -> Rows:
    """Rows of all other implementations."""
    return [row for row in rows if (row["impl"], row["op"]) not in impls]


def block_sums(rows: Rows, shapes: Iterable[tuple[int, int]], m: int) -> dict[Impl, dict[str, float]]:
    """Sums of us and floor_us over the shapes at m; implementations that lack a shape are left out."""
    shapes = list(shapes)
    sums: dict[Impl, dict[str, float]] = {}
    for impl in dict.fromkeys((row["impl"], row["op"]) for row in rows):
        found = [select(rows, impl=impl[0], op=impl[1], m=m, n=n, k=k) for n, k in shapes]
        if all(found):
            sums[impl] = {name: sum(min(row[name] for row in hits) for hits in found) for name in ("us", "floor_us")}
    return sums


def ordered(impls: Iterable[Impl]) -> list[Impl]:
    """Without the baseline, known ones first, in the order of LABELS."""
    seen = set(impls) - {BASELINE}
    return [impl for impl in LABELS if impl in seen] + sorted(seen - set(LABELS))


def label(impl: Impl) -> str:
    """As tables show it, in Markdown."""
    return LABELS.get(impl, " ".join(impl))


def pick(found: list[dict[str, Any]], gpu: str | None = None) -> dict[str, Any] | None:
    """The newest record with rows, of those whose GPU's name contains gpu."""
    fitting = [record for record in found if record["rows"] and (gpu is None or gpu.lower() in record["gpu"].lower())]
    return max(fitting, key=lambda record: (str(record["date"]), str(record["gpu"])), default=None)
