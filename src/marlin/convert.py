"""Checkpoints of other tools to ours, and ours to theirs: `convert` a directory, `save_pack_quantized` a model.

Owns the walk over a directory: shard by shard, one layer at a time, all other tensors and files taken along, written
aside and renamed when complete. What the bits of a format mean belongs to `marlin.formats`. Memory is bounded by the
tensors of one shard. Imports no transformers, but for `save_pack_quantized`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlin import nn
from marlin.errors import message, require
from marlin.formats import Weight, checkpoint, published
from marlin.formats.atomic import check_replaceable, replace_directory
from marlin.formats.checkpoint import CONFIG_FILE, INDEX_FILE, QUANT_METHOD, WEIGHTS_FILE, LayerSpec
from marlin.formats.layouts import pack, unpack
from marlin.formats.published import PACK_QUANTIZED
from marlin.formats.safetensors_header import TensorEntry

TARGETS = ("marlin", PACK_QUANTIZED.name)
# Formats whose published kernels run in float16 only, whatever dtype the model was made in.
_FLOAT16_ONLY = (published.MARLIN_24, published.GPTQ_MARLIN_24, published.MARLIN)
_LEFT_BEHIND = (".safetensors", ".py", ".gguf", ".h5", ".msgpack", ".onnx", *published.PICKLES)
_SPLIT_EXPERT = re.compile(r"\.experts\.\d+\.gate_up_proj$")
_OUR_NOTES = ("README.md", "compression_report.json")  # what save_pretrained writes about our directory


@dataclass(frozen=True)
class LayerRow:
    """One converted layer. Bytes count its quantized tensors, before and after; a bias is not counted."""

    name: str
    kind: str
    group_size: int
    n: int
    k: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: formats, layers, and the bytes of all tensors that were taken along as they are."""

    directory: Path
    source_format: str
    target_format: str
    layers: tuple[LayerRow, ...]
    other_tensors: int
    other_bytes: int

    def kinds(self) -> dict[str, tuple[int, int, int]]:
        """(layers, bytes before, bytes after) of each kind."""
        totals: dict[str, tuple[int, int, int]] = {}
        for row in self.layers:
            count, before, after = totals.get(row.kind, (0, 0, 0))
            totals[row.kind] = (count + 1, before + row.bytes_before, after + row.bytes_after)
        return totals


@dataclass(frozen=True)
class _Source:
    """A directory to convert. parts: names of each layer's tensors, of which the first says in which shard it goes."""

    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    parts: Mapping[str, tuple[str, ...]]
    read: Callable[[str], Weight]


def _open_ours(directory: Path) -> _Source:
    ours = checkpoint.open_directory(directory)
    ranks = {name: spec.low_rank for name, spec in ours.layers.items() if spec.low_rank}
    got = ", ".join(f"{name}: rank {rank}" for name, rank in list(ranks.items())[:1])
    fix = "That format has no place for it: compress without --low-rank."
    require(not ranks, f"convert {directory}", "layers must have no low-rank correction", got, fix)
    split = [name for name in ours.layers if _SPLIT_EXPERT.search(name)]
    fix = "Engines that read it name experts in other ways: compress with a rule that skips '*.experts.*'."
    require(not split, f"convert {directory}", "layers must be no experts of a mixture", ", ".join(split[:1]), fix)
    parts = {name: tuple(f"{name}.{leaf}" for leaf in spec.tensor_shapes()) for name, spec in ours.layers.items()}
    config = {key: value for key, value in ours.config.items() if key not in published.CONFIG_KEYS}
    return _Source("marlin", config, ours.tensors, parts, lambda name: unpack(ours.packed(name)))


def _open_theirs(directory: Path, quantize_to: int | None) -> _Source:
    theirs = published.open_published(directory)
    names = sorted({form.name for form in theirs.layers.values()})
    parts = {name: tuple(f"{name}.{leaf}" for leaf in theirs.layer_tensors(name)) for name in theirs.layers}
    config = {key: value for key, value in theirs.config.items() if key not in published.CONFIG_KEYS}
    if any(form in _FLOAT16_ONLY for form in theirs.layers.values()):
        config |= {key: "float16" for key in ("dtype", "torch_dtype") if key in config}
    if quantize_to is not None:
        need = "only 2:4 weights in floating point (sparse-24-bitmask) can be quantized here"
        require(theirs.is_unquantized, "convert --quantize", need, ", ".join(names), "Leave --quantize out.")
    elif theirs.is_unquantized:
        theirs.read(next(iter(theirs.layers)))  # Refuses, with the way out.

    def read(layer: str) -> Weight:
        if quantize_to is None:
            return theirs.read(layer)
        dense, mask = theirs.read_unquantized(layer)
        return nn.SparseLinear.from_dense(dense, group_size=quantize_to, mask=mask).to_weight()

    return _Source(", ".join(names), config, theirs.tensors, parts, read)


def _open(directory: Path, to: str, quantize_to: int | None) -> _Source:
    if checkpoint.is_directory_of_ours(directory):
        fix = f"Convert it to another format: --to {PACK_QUANTIZED.name}."
        require(to != "marlin", f"convert {directory}", "the input must be in another format", "marlin", fix)
        return _open_ours(directory)
    return _open_theirs(directory, quantize_to)


def _tensors_of(layer: str, weight: Weight, to: str) -> dict[str, Tensor]:
    if to == PACK_QUANTIZED.name:
        return {f"{layer}.{leaf}": tensor for leaf, tensor in published.write_pack_quantized(weight).items()}
    packed = pack(weight)
    leaves = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
    return {f"{layer}.{leaf}": tensor for leaf, tensor in leaves.items() if tensor is not None}


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shards(source: _Source) -> list[tuple[Path, list[str], list[str]]]:
    """(file, layers, other tensors) of each shard that has any."""
    taken = {name for parts in source.parts.values() for name in parts}
    plan: dict[Path, tuple[list[str], list[str]]] = {}
    for layer, parts in source.parts.items():
        plan.setdefault(source.tensors[parts[0]].file, ([], []))[0].append(layer)
    for name, entry in source.tensors.items():
        if name not in taken:
            plan.setdefault(entry.file, ([], []))[1].append(name)
    return [(file, *plan[file]) for file in sorted(plan)]


def _convert_shards(source: _Source, to: str, target: Path, progress: Callable[[int, int], None]) -> Iterator[LayerRow]:
    """Write the safetensors files, and their index where there are several; yields a row for each layer."""
    plan = _shards(source)
    weight_map: dict[str, str] = {}
    done = total_bytes = 0
    progress(done, len(source.parts))
    for index, (file, layers, others) in enumerate(plan, start=1):
        name = WEIGHTS_FILE if len(plan) == 1 else f"model-{index:05d}-of-{len(plan):05d}.safetensors"
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors: dict[str, Tensor] = {other: opened.get_tensor(other) for other in others}
        for layer in layers:
            weight = source.read(layer)
            written = _tensors_of(layer, weight, to)
            before = sum(source.tensors[part].nbytes for part in source.parts[layer])
            yield LayerRow(layer, weight.kind, weight.group_size, weight.n, weight.k, before, _nbytes(written))
            tensors |= written
            done += 1
            progress(done, len(source.parts))
        save_file(tensors, target / name, metadata={"format": "pt"})
        total_bytes += _nbytes(tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(plan) > 1:
        body = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (target / INDEX_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _describe(rows: list[LayerRow], others: list[tuple[str, TensorEntry]], to: str) -> dict[str, Any]:
    if to == "marlin":
        return checkpoint.describe({row.name: LayerSpec(row.kind, row.group_size, row.n, row.k) for row in rows})
    quantized = {row.name: row.group_size for row in rows}
    ignore = {name.rpartition(".")[0] for name, entry in others if name.endswith(".weight") and len(entry.shape) == 2}
    # Why: a head that is tied to the embedding has no tensor of its own, and is a linear all the same.
    return published.describe_pack_quantized(quantized, (ignore | {"lm_head"}) - set(quantized))


def _copy_files(directory: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Tokenizer, generation config and what else lies beside the weights; no code, no pickles, no subdirectories."""
    for path in sorted(directory.iterdir()):
        is_index = path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        left = path.suffix in _LEFT_BEHIND or path.name in (CONFIG_FILE, *published.SIDE_CONFIGS, *skip)
        if is_index or left or path.name.startswith(".") or not path.is_file():
            continue
        shutil.copyfile(checkpoint.check_inside(directory, path, str(directory)), target / path.name)


def _check_places(directory: Path, target: Path) -> None:
    op = f"convert {directory}"
    if not directory.is_dir():
        raise FileNotFoundError(message(op, "the input must be a directory", "no such directory", "Check the path."))
    inside = directory.resolve().is_relative_to(target.resolve())
    require(not inside, op, "the output must not replace the input", str(target), "Choose another output directory.")


def convert(
    directory: Path | str,
    target: Path | str,
    *,
    to: str = "marlin",
    quantize_to: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Write the model in directory to target in another format, whole or not at all.

    directory: one of the formats of `marlin.formats.published`, or ours when to is "pack-quantized". to: "marlin"
    (ours: loads through transformers after `import marlin`), or "pack-quantized" (compressed-tensors, 2:4 as zeros).
    quantize_to: group size to which 2:4 weights in floating point are rounded, with a search of the clip; without it
    they are refused. overwrite: as in `marlin.save_pretrained`. progress: called with (done, total) layers.
    Raises: CheckpointError (what cannot be read, by name), ValueError (to, quantize_to, places), FileExistsError,
    NotADirectoryError, OSError.
    """
    directory, target = Path(directory), Path(target)
    require(to in TARGETS, "convert", f"to must be one of {', '.join(TARGETS)}", repr(to))
    _check_places(directory, target)

    def is_ours(path: Path) -> bool:
        return to == "marlin" and checkpoint.is_directory_of_ours(path)

    check_replaceable(target, overwrite, is_ours)
    source = _open(directory, to, quantize_to)
    taken = {name for parts in source.parts.values() for name in parts}
    others = [(name, entry) for name, entry in source.tensors.items() if name not in taken]
    with replace_directory(target, overwrite=overwrite, is_ours=is_ours) as temporary:
        rows = list(_convert_shards(source, to, temporary, progress))
        config = {**source.config, "quantization_config": _describe(rows, others, to)}
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_files(directory, temporary, _OUR_NOTES if source.format == "marlin" and to != "marlin" else ())
        # Invariant: what was written can be read.
        (checkpoint.open_directory if to == "marlin" else published.open_published)(temporary)
    other_bytes = sum(entry.nbytes for _, entry in others)
    return Conversion(target, source.format, to, tuple(rows), len(others), other_bytes)


def save_pack_quantized(
    model: Any, directory: Path | str, *, tokenizer: Any = None, overwrite: bool = False
) -> Conversion:
    """Save a model of transformers with `SparseLinear` layers as a plain compressed-tensors `pack-quantized` directory.

    Loads wherever that format does, without this package; 2:4 weights hold zeros and run as dense INT4.
    Raises: as `marlin.save_pretrained` and `convert`.
    """
    from marlin import api

    target = Path(directory)
    check_replaceable(target, overwrite, lambda _: False)
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    # Why beside the target: the disk that can hold the result can hold it twice, which a small /tmp may not.
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.tmp-", dir=target.resolve().parent) as temporary:
        ours = api.save_pretrained(model, Path(temporary) / QUANT_METHOD, tokenizer=tokenizer)
        return convert(ours, target, to=PACK_QUANTIZED.name, overwrite=overwrite)
