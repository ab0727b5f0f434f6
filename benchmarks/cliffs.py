"""Where a batch size costs more than it should: slower than cuBLAS, or slower than a larger batch.

Owns these two questions about rows of a gemm record, and their answers in words. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]
# A batch may take this much longer than the next power of two before it counts as a cliff.
ALLOWANCE = 1.10
# Layers smaller than this along N or K are not held against cuBLAS.
MIN_EXTENT = 2048


def _curves(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[int, float]]:
    """us by M, for each (impl, op, dtype, group_size, n, k)."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        key = (row["impl"], row["op"], row["dtype"], row["group_size"], row["n"], row["k"])
        found.setdefault(key, {})[row["m"]] = row["us"]
    return found


def slower_than_cublas(rows: list[Row], op: str) -> Iterator[tuple[Row, float]]:
    """Own rows of op that take longer than cuBLAS at the same point, with the speedup (below 1)."""
    base = {key[2:]: curve for key, curve in _curves(rows).items() if key[:2] == ("cublas", "fp16")}
    for row in rows:
        point = (row["dtype"], row["group_size"], row["n"], row["k"])
        us = base.get(point, {}).get(row["m"])
        small = min(row["n"], row["k"]) < MIN_EXTENT
        if row["impl"] == "marlin" and row["op"] == op and us is not None and us < row["us"] and not small:
            yield row, us / row["us"]


def steps(rows: list[Row], op: str) -> Iterator[tuple[Row, int, float]]:
    """Own rows of op with a larger measured power of two above M that is faster by more than the allowance.

    Yields (row, that power of two, times longer).
    """
    curves = _curves(rows)
    for row in rows:
        if row["impl"] != "marlin" or row["op"] != op:
            continue
        curve = curves[(row["impl"], row["op"], row["dtype"], row["group_size"], row["n"], row["k"])]
        above = 1 << (row["m"] - 1).bit_length()
        if above in curve and row["us"] > ALLOWANCE * curve[above]:
            yield row, above, row["us"] / curve[above]


def lines(rows: list[Row]) -> Iterator[str]:
    """Both answers in words, for each own operation among the rows."""
    for op in dict.fromkeys(row["op"] for row in rows if row["impl"] == "marlin"):
        slow = [
            f"{row['n']}x{row['k']} {row['dtype']} M={row['m']} {times:.2f}x"
            for row, times in slower_than_cublas(rows, op)
        ]
        yield f"{op} slower than cuBLAS: {', '.join(slow) or 'nowhere'}"
        high = [
            f"{row['n']}x{row['k']} {row['dtype']} M={row['m']} {times:.2f} times M={above}"
            for row, above, times in steps(rows, op)
        ]
        yield f"{op} cliffs: {', '.join(high) or 'none'}"
