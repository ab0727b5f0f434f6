"""The directory of a compressed model: its description in config.json, its safetensors files, and their checks.

A directory is what Hugging Face writes, with `quantization_config` in config.json:

    {"quant_method": "sparse_marlin", "version": 1,
     "layers": {"model.layers.0.mlp.up_proj": {"kind": "w4a16_sp24", "group_size": 128, "shape": [N, K]}, ...}}

and, for each of these layers, tensors `<layer>.codes`, `.meta` (2:4 only), `.scales` in the packed layout of
`marlin.formats.layouts.fragment`, and `.bias` [N] where the layer has one. A layer with `"low_rank": r` also has
`.low_rank_up` [N, r] and `.low_rank_down` [r, K], whose product is added to its weight. All other tensors are as the
model defines.

Owns: what a description says, which tensors follow from it, and their safe reading. Nothing is allocated before header,
dtype, shape and place have been checked. Knows nothing of modules, transformers or kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from marlin.errors import CheckpointError
from marlin.formats import int4
from marlin.formats.layouts.fragment import TILE_K, TILE_N, TILE_WORDS, PackedWeight
from marlin.formats.safetensors_header import TensorEntry, parse_json, read_header, refuse
from marlin.formats.weight import K_MULTIPLE, N_MULTIPLE

QUANT_METHOD = "sparse_marlin"
VERSION = 1
KINDS = tuple(TILE_WORDS)
WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
_SCALE_DTYPES = ("F16", "BF16", "F32")
_SAVE_AGAIN = "Save the model again with marlin.save_pretrained."
_LAYER_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class LayerSpec:
    """One quantized layer of a description: kind, group_size (dense positions, or -1), the weight's N and K, and the
    rank of its low-rank correction, 0 without one."""

    kind: str
    group_size: int
    n: int
    k: int
    low_rank: int = 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that this layer must have, by the last part of their names."""
        tiles_n, tiles_k = -(-self.n // TILE_N), -(-self.k // TILE_K)
        code_words, meta_words = TILE_WORDS[self.kind]
        shapes: dict[str, tuple[int, ...]] = {"codes": (tiles_n, tiles_k, code_words)}
        if meta_words:
            shapes["meta"] = (tiles_n, tiles_k, meta_words)
        shapes["scales"] = (tiles_n, int4.num_groups(self.k, self.group_size), TILE_N)
        if self.low_rank:
            shapes |= {"low_rank_up": (self.n, self.low_rank), "low_rank_down": (self.low_rank, self.k)}
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        body = {"kind": self.kind, "group_size": self.group_size, "shape": [self.n, self.k]}
        return body | ({"low_rank": self.low_rank} if self.low_rank else {})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_layer(op: str, entry: Any) -> LayerSpec:
    if not isinstance(entry, dict) or set(entry) - {"low_rank"} != {"kind", "group_size", "shape"}:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise refuse(op, "the entry must have exactly kind, group_size and shape", f"{got}", _SAVE_AGAIN)
    rank = entry.get("low_rank", 0)
    if not _is_int(rank) or rank < 0 or ("low_rank" in entry and rank == 0):
        raise refuse(op, "low_rank must be a positive integer", repr(rank), _SAVE_AGAIN)
    kind, group_size, shape = entry["kind"], entry["group_size"], entry["shape"]
    if kind not in KINDS:
        raise refuse(op, f"kind must be one of {KINDS}", repr(kind), "A newer release may read it.")
    if not _is_int(group_size) or group_size not in int4.GROUP_SIZES:
        raise refuse(op, f"group_size must be one of {int4.GROUP_SIZES}", repr(group_size), _SAVE_AGAIN)
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(_is_int(extent) for extent in shape):
        raise refuse(op, "shape must be [N, K]", repr(shape), _SAVE_AGAIN)
    n, k = shape
    if n <= 0 or n % N_MULTIPLE or k <= 0 or k % K_MULTIPLE:
        need = f"N must be a positive multiple of {N_MULTIPLE} and K of {K_MULTIPLE}"
        raise refuse(op, need, f"shape={[n, k]}", _SAVE_AGAIN)
    if group_size != -1 and k % group_size:
        raise refuse(op, f"K must be a multiple of group_size={group_size}", f"K={k}", _SAVE_AGAIN)
    if rank > min(n, k):
        raise refuse(op, f"low_rank must be at most {min(n, k)}", f"{rank}", _SAVE_AGAIN)
    return LayerSpec(kind, group_size, n, k, rank)


def parse_description(config: Any, source: str = CONFIG_FILE) -> dict[str, LayerSpec]:
    """Layers of a `quantization_config`, checked. source: the file that errors name.

    Raises: CheckpointError (quant_method, version, or a layer's entry; the text names key, value and way out).
    """
    op = f"{source}, quantization_config"
    if not isinstance(config, Mapping):
        raise refuse(op, "it must be a JSON object", type(config).__name__, _SAVE_AGAIN)
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        fix = "This directory was written by another method: load it with that one."
        raise refuse(op, f"quant_method must be {QUANT_METHOD!r}", repr(method), fix)
    version = config.get("version")
    if not _is_int(version) or version != VERSION:
        fix = "Update sparse-marlin to read newer versions." if _is_int(version) else _SAVE_AGAIN
        raise refuse(op, f"version must be {VERSION}", repr(version), fix)
    layers = config.get("layers")
    if not isinstance(layers, Mapping):
        raise refuse(op, "layers must be a JSON object", type(layers).__name__, _SAVE_AGAIN)
    for name in layers:
        if not isinstance(name, str) or not _LAYER_NAME.fullmatch(name):
            raise refuse(
                op, "names of layers must be module names, as model.layers.0.mlp.up_proj", repr(name), _SAVE_AGAIN
            )
    return {name: _parse_layer(f"{op}, layer {name}", entry) for name, entry in layers.items()}


def describe(layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """The `quantization_config` of these layers; `parse_description` is its inverse."""
    entries = {name: spec.to_dict() for name, spec in layers.items()}
    return {"quant_method": QUANT_METHOD, "version": VERSION, "layers": entries}


def _check_tensor(name: str, entry: TensorEntry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    op = f"{entry.file}, tensor {name!r}"
    if entry.dtype not in dtypes:
        raise refuse(op, f"dtype must be {' or '.join(dtypes)}", entry.dtype, _SAVE_AGAIN)
    if entry.shape != shape:
        raise refuse(op, f"shape must be {list(shape)}", f"{list(entry.shape)}", _SAVE_AGAIN)


def check_layer_tensors(layers: Mapping[str, LayerSpec], tensors: Mapping[str, TensorEntry], source: str) -> None:
    """Whether every layer has exactly its tensors, with their dtypes and shapes. source: the directory, for errors.

    Raises: CheckpointError (missing tensor, tensor that does not belong to the kind, dtype, shape).
    """
    for layer, spec in layers.items():
        for leaf, shape in spec.tensor_shapes().items():
            name = f"{layer}.{leaf}"
            if name not in tensors:
                fix = "Copy or download all of the files again."
                raise refuse(source, f"{spec.kind} layer {layer} must have a tensor {name!r}", "none", fix)
            _check_tensor(name, tensors[name], ("I32",) if leaf in ("codes", "meta") else _SCALE_DTYPES, shape)
        if f"{layer}.bias" in tensors:
            _check_tensor(f"{layer}.bias", tensors[f"{layer}.bias"], _SCALE_DTYPES, (spec.n,))
    for name, entry in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf != "bias" and leaf not in layers[layer].tensor_shapes():
            need = f"{layers[layer].kind} layer {layer} may only have {', '.join(layers[layer].tensor_shapes())}, bias"
            raise refuse(str(entry.file), need, repr(name), _SAVE_AGAIN)


def packed_meta_is_legal(meta: torch.Tensor) -> bool:
    """Whether every nibble `i0 | i1 << 2` of packed metadata words (int32, any shape) has i0 < i1."""
    i0_high, i1_low, i1_high = meta >> 1, meta >> 2, meta >> 3
    # Why: i0 < i1 on two-bit numbers, for the eight nibbles of a word at once; only bit 0 of each nibble counts.
    less = (i1_high & ~i0_high) | (~(i1_high ^ i0_high) & i1_low & ~meta)
    return bool(((less & 0x11111111) == 0x11111111).all())


def _count_nonzero_codes(codes: torch.Tensor) -> int:
    """Codes other than 0 in packed words (nibbles of code + 8); padding holds code 0 and counts nothing."""
    total = 0
    for words in codes.flatten().split(1 << 24):
        bits = words ^ -0x77777778  # 0x88888888 as int32
        flags = (bits | bits >> 1 | bits >> 2 | bits >> 3) & 0x11111111
        pairs = flags.view(torch.uint8)
        total += int(((pairs & 1) + (pairs >> 4)).sum(dtype=torch.int64))
    return total


def check_values(op: str, meta: torch.Tensor | None, scales: torch.Tensor, fix: str = _SAVE_AGAIN) -> None:
    """Whether a layer's metadata are legal and its scales finite. Raises: CheckpointError."""
    if meta is not None and not packed_meta_is_legal(meta):
        need = "every metadata nibble must hold two rising positions (i0 | i1 << 2 with i0 < i1)"
        raise refuse(op, need, "an illegal nibble in meta", fix)
    if not bool(scales.isfinite().all()):
        raise refuse(op, "scales must be finite", f"NaN or infinity in {scales.dtype}", fix)


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose description and headers have been checked; tensors are read on demand.

    layers: the quantized ones by name. tensors: all of them by name. config: all of config.json.
    """

    directory: Path
    layers: Mapping[str, LayerSpec]
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.tensors[name].file, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def packed(self, layer: str) -> PackedWeight:
        """A layer's weight, values checked. Raises: CheckpointError (illegal metadata, scales not finite), KeyError."""
        spec = self.layers[layer]
        meta = self.read(f"{layer}.meta") if "meta" in spec.tensor_shapes() else None
        scales = self.read(f"{layer}.scales")
        check_values(f"{self.directory}, layer {layer}", meta, scales)
        codes = self.read(f"{layer}.codes")
        return PackedWeight(spec.kind, codes, meta, scales, spec.n, spec.k, spec.group_size).validate()

    def check_all_values(self) -> Checkpoint:
        """Read every layer and check its values; returns self. Raises: as `packed`."""
        for layer in self.layers:
            self.packed(layer)
        return self


def is_directory_of_ours(directory: Path) -> bool:
    """Whether directory holds a config.json with our quant_method, of any version."""
    try:
        config = parse_json((directory / CONFIG_FILE).read_bytes(), CONFIG_FILE)
    except (OSError, CheckpointError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise refuse(str(path), "the file must be readable", error.strerror or str(error), "Check the path.") from error
    value = parse_json(text, str(path))
    if not isinstance(value, dict):
        raise refuse(str(path), "the file must hold a JSON object", type(value).__name__)
    return value


def check_inside(directory: Path, file: Path, source: str) -> Path:
    """The file, if it lies in directory once links are followed. source: what names the file, for errors.

    A directory `snapshots/<revision>` of a download cache may link into the `blobs` beside `snapshots`.
    Raises: CheckpointError.
    """
    roots = [directory.resolve()]
    if directory.absolute().parent.name == "snapshots":
        roots.append(directory.absolute().parent.parent.resolve() / "blobs")
    if ".." in file.relative_to(directory).parts or not any(file.resolve().is_relative_to(root) for root in roots):
        fix = "Do not load it: a checkpoint has no reason to read other files."
        raise refuse(source, f"files must lie in {directory}", f"{file.relative_to(directory)}", fix)
    return file


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and the index's map from tensor to file where there is one."""
    index_path = directory / INDEX_FILE
    single = directory / WEIGHTS_FILE
    if single.exists() or not index_path.exists():
        return [check_inside(directory, single, str(directory))], None
    weight_map = _read_json_object(check_inside(directory, index_path, str(directory))).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise refuse(str(index_path), "weight_map must map names of tensors to names of files", repr(weight_map)[:80])
    files = []
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors") or "\\" in name or "\0" in name or Path(name).is_absolute():
            fix = "Do not load it: a checkpoint has no reason to read other files."
            raise refuse(str(index_path), "weight_map must name .safetensors files of this directory", repr(name), fix)
        files.append(check_inside(directory, directory / name, str(index_path)))
    return files, weight_map


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory's safetensors files, by name. Raises: CheckpointError."""
    files, weight_map = _weight_files(directory)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise refuse(str(file), "a tensor must be in one file only", f"{name!r}, also in {tensors[name].file}")
            tensors[name] = entry
    if weight_map is not None:
        wrong = [n for n, f in weight_map.items() if n not in tensors or tensors[n].file != directory / f]
        extra = sorted(set(tensors) - set(weight_map))
        if wrong or extra:
            got = f"{wrong[0]!r} not in {weight_map[wrong[0]]}" if wrong else f"{extra[0]!r} not in the index"
            raise refuse(str(directory / INDEX_FILE), "index and files must name the same tensors", got)
    return tensors


def open_directory(directory: Path | str) -> Checkpoint:
    """Check a directory's description and headers; reads no tensor data.

    Raises: CheckpointError (file, key and value at fault, and the way out).
    """
    directory = Path(directory)
    config_path = directory / CONFIG_FILE
    config = _read_json_object(config_path)
    if "quantization_config" not in config:
        fix = "Compress the model first: marlin compress MODEL OUT."
        raise refuse(str(config_path), "the model must be compressed (key quantization_config)", "no such key", fix)
    layers = parse_description(config["quantization_config"], str(config_path))
    tensors = read_headers(directory)
    check_layer_tensors(layers, tensors, str(directory))
    return Checkpoint(directory, layers, tensors, config)


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer as `marlin inspect` shows it; the zero fraction is computed when first asked for.

    nbytes: codes, metadata, scales and low-rank correction, padding included; a bias is not counted.
    """

    name: str
    spec: LayerSpec
    nbytes: int
    checkpoint: Checkpoint = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense weight, scales, metadata and low-rank correction included."""
        return 8 * self.nbytes / (self.spec.n * self.spec.k)

    @cached_property
    def zero_fraction(self) -> float:
        """Share of the dense weights that are zero: pruned, or of code 0. Reads the codes."""
        nonzero = _count_nonzero_codes(self.checkpoint.read(f"{self.name}.codes"))
        return 1.0 - nonzero / (self.spec.n * self.spec.k)

    def to_dict(self, zero_fraction: bool = True) -> dict[str, Any]:
        """Flat JSON form; zero_fraction=False leaves the codes unread."""
        row = {"name": self.name, "kind": self.spec.kind, "n": self.spec.n, "k": self.spec.k}
        row |= {"group_size": self.spec.group_size, "bytes": self.nbytes, "bits_per_weight": self.bits_per_weight}
        row |= {"low_rank": self.spec.low_rank} if self.spec.low_rank else {}
        return row | ({"zero_fraction": self.zero_fraction} if zero_fraction else {})


@dataclass(frozen=True)
class DirectorySummary:
    """What a directory holds: its quantized layers, and the bytes of everything else by tensor name."""

    directory: Path
    layers: tuple[LayerSummary, ...]
    unquantized_bytes: Mapping[str, int]
    config: Mapping[str, Any] = field(repr=False)

    @property
    def quantized_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        return self.quantized_bytes + sum(self.unquantized_bytes.values())

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized layers together; 0 when there are none."""
        weights = sum(layer.spec.n * layer.spec.k for layer in self.layers)
        return 8 * self.quantized_bytes / weights if weights else 0.0


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10; config.json is in the order of characters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _summaries(checkpoint: Checkpoint) -> Iterator[LayerSummary]:
    for name, spec in sorted(checkpoint.layers.items(), key=lambda item: _natural(item[0])):
        nbytes = sum(checkpoint.tensors[f"{name}.{leaf}"].nbytes for leaf in spec.tensor_shapes())
        yield LayerSummary(name, spec, nbytes, checkpoint)


def read_directory_summary(directory: Path | str) -> DirectorySummary:
    """Layers, shapes and bytes of a directory, from its headers alone. Raises: as `open_directory`."""
    checkpoint = open_directory(directory)
    quantized = {f"{name}.{leaf}" for name, spec in checkpoint.layers.items() for leaf in spec.tensor_shapes()}
    others = {name: entry.nbytes for name, entry in checkpoint.tensors.items() if name not in quantized}
    return DirectorySummary(checkpoint.directory, tuple(_summaries(checkpoint)), others, checkpoint.config)
