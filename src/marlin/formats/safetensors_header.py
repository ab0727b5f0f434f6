"""Reading the header of a safetensors file without trusting it.

Owns: the file's frame (8 bytes of length, JSON, data), its data types, and the checks that make it safe to allocate and
map what the header announces. Knows nothing of layers, quantization or directories.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin.errors import CheckpointError, message

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_ALTERED = "The file is truncated or altered: copy or download it again."


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: file, dtype (safetensors name), shape, bytes of data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def refuse(op: str, requirement: str, got: str, fix: str = _ALTERED) -> CheckpointError:
    """The error of a checkpoint that breaks `requirement`."""
    return CheckpointError(message(op, requirement, got, fix))


def parse_json(text: bytes, op: str, fix: str = _ALTERED) -> Any:
    """JSON without repeated keys. Raises: CheckpointError (no UTF-8, no JSON, nested too deep, repeated key)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise refuse(op, "every key must appear once", f"{repeated[:4]} more than once", fix)
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise refuse(
            op, "the text must be JSON in UTF-8", f"{type(error).__name__}: {error}".rstrip("."), fix
        ) from error


def _read_frame(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and how many bytes of data follow it."""
    op = str(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            if len(head) < 8:
                raise refuse(op, "a safetensors file must have at least 8 bytes", f"{size} bytes")
            (length,) = struct.unpack("<Q", head)
            limit = min(size - 8, MAX_HEADER_BYTES)
            if length > limit:
                raise refuse(op, f"header length must be at most {limit} in a file of {size} bytes", f"{length}")
            header = parse_json(file.read(length), f"{op} (header)")
    except OSError as error:
        raise refuse(op, "the file must be readable", error.strerror or str(error), "Check path and rights.") from error
    if not isinstance(header, dict):
        raise refuse(op, "the header must be a JSON object", type(header).__name__)
    return header, size - 8 - length


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[TensorEntry, int]:
    """One checked entry and the offset at which its data begins."""
    op = f"{path}, tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise refuse(op, "the entry must have exactly dtype, shape and data_offsets", f"{got}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(op, f"dtype must be one of {', '.join(DTYPE_BITS)}", repr(dtype))
    if not isinstance(shape, list) or not all(_is_count(extent) for extent in shape):
        raise refuse(op, "shape must be a list of integers of at least 0", repr(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise refuse(op, "data_offsets must be two integers of at least 0", repr(offsets))
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise refuse(op, f"data_offsets must rise and lie within the {data_bytes} bytes of data", f"{offsets}")
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise refuse(op, f"{dtype} of shape {shape} must take {expected} bytes", f"{end - begin} bytes at {offsets}")
    return TensorEntry(path, dtype, tuple(shape), expected), begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, checked before anything is allocated.

    Data must lie end to end within the file: no overlap, no hole, nothing behind the last tensor.
    Raises: CheckpointError (file, tensor, key, value).
    """
    header, data_bytes = _read_frame(path)
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    places: list[tuple[int, int, str]] = []
    for name, raw in header.items():
        entries[name], begin = _read_entry(path, name, raw, data_bytes)
        places.append((begin, begin + entries[name].nbytes, name))
    covered = 0
    for begin, end, name in sorted(places):
        if begin != covered:
            what = "overlap" if begin < covered else "leave a hole"
            raise refuse(
                f"{path}, tensor {name!r}",
                "data of tensors must lie end to end",
                f"{begin} after {covered}: they {what}",
            )
        covered = end
    if covered != data_bytes:
        raise refuse(str(path), f"the file must end with its {covered} bytes of data", f"{data_bytes} bytes of data")
    return entries
