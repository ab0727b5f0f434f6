"""Records: the files that hold measurements, their schema, and whether they are current.

Owns reading, checking, merging and writing `benchmarks/records/*.json`. Needs no GPU.

A gemm record: gpu, driver, torch, cuda, nvrtc, python, date, clocks, ceilings, kernel_hash, absent, rows. A row:
impl, op, dtype, group_size (of the run, also for the fp16 baseline), meta_bits, m, n, k, us, p10, p90, bytes,
gb_per_s, tflops_dense_equivalent, floor_us, fraction_of_floor, config.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from marlin.errors import message

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
DTYPES = ("float16", "bfloat16")
ROW_TYPES: dict[str, tuple[type, ...]] = {
    "impl": (str,),
    "op": (str,),
    "dtype": (str,),
    "group_size": (int,),
    "meta_bits": (int, type(None)),
    "m": (int,),
    "n": (int,),
    "k": (int,),
    "us": (float,),
    "p10": (float,),
    "p90": (float,),
    "bytes": (int,),
    "gb_per_s": (float,),
    "tflops_dense_equivalent": (float,),
    "floor_us": (float,),
    "fraction_of_floor": (float,),
    "config": (str, type(None)),
}
HEAD = ("gpu", "driver", "torch", "cuda", "nvrtc", "python", "date", "clocks", "kernel_hash", "rows")


def kernel_hash(root: pathlib.Path = ROOT) -> str:
    """sha256 over the files below src/marlin/kernels in the order of their relative POSIX paths: path, 0, bytes, 0."""
    folder = root / "src" / "marlin" / "kernels"
    digest = hashlib.sha256()
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    # Why parts: the order of paths component by component ("a/b" before "a.x"), not that of their text.
    for name in sorted(names, key=lambda text: text.split("/")):
        if "__pycache__" not in name.split("/"):
            digest.update(name.encode() + b"\0" + names[name].read_bytes() + b"\0")
    return digest.hexdigest()


def is_stale(record: dict[str, Any], root: pathlib.Path = ROOT) -> bool:
    """Whether the record was measured with other kernels than those in the tree."""
    return bool(record.get("kernel_hash") != kernel_hash(root))


def check_row(row: dict[str, Any]) -> None:
    """Raises: ValueError (a field that is missing, unknown, of another type, or a time that cannot be)."""
    for name, types in ROW_TYPES.items():
        if name not in row or not isinstance(row[name], types) or isinstance(row[name], bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(message("record row", f"{name} must be {wanted}", repr(row.get(name))))
    unknown = sorted(set(row) - set(ROW_TYPES))
    if unknown:
        raise ValueError(message("record row", "fields must be those of the schema", ", ".join(unknown)))
    if row["dtype"] not in DTYPES:
        raise ValueError(message("record row", f"dtype must be one of {DTYPES}", repr(row["dtype"])))
    if not 0 < row["p10"] <= row["us"] <= row["p90"]:
        got = f"{row['p10']}, {row['us']}, {row['p90']}"
        raise ValueError(message("record row", "times must satisfy 0 < p10 <= us <= p90", got))


def check(record: dict[str, Any]) -> dict[str, Any]:
    """Check a gemm record; returns it. Raises: ValueError (the first fault)."""
    missing = [name for name in HEAD if name not in record]
    if missing:
        raise ValueError(message("record", f"a record must have {', '.join(HEAD)}", f"none of {', '.join(missing)}"))
    for row in record["rows"]:
        check_row(row)
    return record


def _point(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("m", "n", "k", "dtype", "group_size"))


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """new, plus the rows of old at points that new did not measure.

    All rows of a point come from one run, so that ratios compare like with like. Rows of other kernels, another
    driver or another torch are dropped.
    """
    same = ("gpu", "driver", "torch", "kernel_hash")
    if old is None or any(old.get(name) != new[name] for name in same):
        return new
    measured = {_point(row) for row in new["rows"]}
    kept = [row for row in old["rows"] if _point(row) not in measured]
    rows = sorted(kept + new["rows"], key=lambda row: (row["n"], row["k"], row["dtype"], row["group_size"], row["m"]))
    return {**new, "rows": rows}


def write(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Write aside, then rename, so that no reader sees half a record. One field a line, one row a line."""
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items() if name != "rows"]
    if "rows" in record:
        fields.append(' "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in record["rows"]) + "\n ]")
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        pathlib.Path(aside).unlink(missing_ok=True)
        raise


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """One record, or None where there is no file."""
    loaded: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return loaded


def read_all(kind: str, folder: pathlib.Path = RECORDS) -> list[dict[str, Any]]:
    """Records `kind-*.json` in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]
