"""A directory of a published format: its description, its files, and which tensors make up each quantized layer.

Owns finding the description and the safetensors files, and the split of tensors into layers and the rest. Headers and
places are checked by `marlin.formats.checkpoint`; no pickle is opened and no code of the directory runs. Tensors are
read one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from marlin.formats.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, check_inside, read_headers
from marlin.formats.published.bitmask import SPARSE_24_BITMASK, read_bitmask
from marlin.formats.published.common import COMPRESS_AGAIN, COPY_AGAIN, Facts, Format, check_leaves, op_of
from marlin.formats.published.describe import describe_published
from marlin.formats.safetensors_header import TensorEntry, parse_json, read_header, refuse
from marlin.formats.weight import Weight

CONFIG_KEYS = ("quantization_config", "compression_config")
# Where GPTQ and AWQ describe the quantization outside config.json, and the method that the file implies.
SIDE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A directory whose description and headers have been checked; tensors are read on demand.

    layers: format of each quantized layer by name. tensors: all of the directory's, by name. config: config.json.
    """

    directory: Path
    layers: Mapping[str, Format]
    facts: Facts
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any] = field(repr=False)

    def layer_tensors(self, layer: str) -> dict[str, TensorEntry]:
        """A layer's tensors by the last part of their names, the bias left out."""
        leaves = self.layers[layer].leaves
        return {leaf: self.tensors[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in self.tensors}

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.tensors[name].file, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _read_all(self, layer: str) -> dict[str, torch.Tensor]:
        return {leaf: self.read_tensor(f"{layer}.{leaf}") for leaf in self.layer_tensors(layer)}

    def read(self, layer: str) -> Weight:
        """A layer's weight, bit for bit. Raises: CheckpointError (what its format's reader refuses)."""
        return self.layers[layer].read(self._read_all(layer), self.facts, layer)

    def read_unquantized(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, mask) of a layer in `sparse-24-bitmask`. Raises: CheckpointError."""
        return read_bitmask(self._read_all(layer), layer)

    @property
    def is_unquantized(self) -> bool:
        """Whether the layers are 2:4 in floating point."""
        return SPARSE_24_BITMASK in self.layers.values()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises: CheckpointError (no such file, no JSON object)."""
    return _read_object(directory, CONFIG_FILE)


def _read_object(directory: Path, name: str) -> dict[str, Any]:
    path = check_inside(directory, directory / name, str(directory))
    try:
        value = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise refuse(str(path), "the file must be readable", error.strerror or str(error), "Check the path.") from error
    if not isinstance(value, dict):
        raise refuse(str(path), "the file must hold a JSON object", type(value).__name__)
    return value


def _find_description(directory: Path, config: Mapping[str, Any]) -> tuple[Any, str]:
    """(description, the file that it is in). Raises: CheckpointError (there is none)."""
    for key in CONFIG_KEYS:
        if config.get(key):
            return config[key], str(directory / CONFIG_FILE)
    for name, method in SIDE_CONFIGS.items():
        if (directory / name).exists():
            return {"quant_method": method, **_read_object(directory, name)}, str(directory / name)
    need = "the model must be quantized (key quantization_config)"
    raise refuse(str(directory / CONFIG_FILE), need, "no such key", "To compress it: marlin compress MODEL OUT.")


def _read_all_headers(directory: Path) -> dict[str, TensorEntry]:
    if (directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists():
        return read_headers(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:  # Why: GPTQ directories name their only file after its bits and group size.
        return read_header(check_inside(directory, files[0], str(directory)))
    got = f"{len(files)} safetensors files and no {INDEX_FILE}"
    fix = COPY_AGAIN
    if any(path.suffix in PICKLES for path in directory.iterdir()):
        got, fix = f"{got}, and pickles", "Pickles run code when opened: ask for a safetensors version of the model."
    raise refuse(str(directory), f"weights must be in {WEIGHTS_FILE} or in the files of an index", got, fix)


def _split_layers(formats: tuple[Format, ...], tensors: Mapping[str, TensorEntry]) -> dict[str, Format]:
    """The format of each layer, whose tensors are exactly those of the format, bias aside. Raises: CheckpointError."""
    marks = {leaf for form in formats for leaf in form.leaves}
    leaves: dict[str, list[str]] = {}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        leaves.setdefault(layer, []).append(leaf)
    layers = {}
    for layer, all_of_them in leaves.items():
        if not layer or not marks & set(all_of_them):
            continue
        present = tuple(leaf for leaf in all_of_them if leaf != "bias")
        fitting = [form for form in formats if set(form.required) <= set(present)]
        form = fitting[0] if fitting else formats[0]
        check_leaves(op_of(form.name, layer), present, form.required, form.optional)
        layers[layer] = form
    return layers


def open_published(directory: Path | str) -> PublishedCheckpoint:
    """Check a directory's description and headers; reads no tensor data.

    Raises: CheckpointError (file, key, layer or tensor at fault, and the way out).
    """
    directory = Path(directory)
    config = read_config(directory)
    description, source = _find_description(directory, config)
    described = describe_published(description, source)
    tensors = _read_all_headers(directory)
    layers = _split_layers(described.formats, tensors)
    if not layers:
        names = " or ".join(form.name for form in described.formats)
        need = f"there must be layers with the tensors of {names} ({', '.join(described.formats[0].required)})"
        raise refuse(str(directory), need, "none", COMPRESS_AGAIN)
    return PublishedCheckpoint(directory, layers, described.facts, tensors, config)
