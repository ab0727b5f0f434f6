"""Compress a model directory of which one decoder block at a time is in memory: for models larger than that.

Owns the model without values, its blocks' way out of the safetensors files and into those of the result, and when this
is worth it. What is written equals, tensor by tensor, what compressing the loaded model and saving it gives. How a
block is compressed belongs to `marlin.compress`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from marlin import api, experts
from marlin.compress import Compressed, Options, Recipe, compress_model
from marlin.errors import CheckpointError, UnsupportedError, message
from marlin.formats import checkpoint
from marlin.formats.atomic import check_replaceable, replace_directory
from marlin.formats.checkpoint import CONFIG_FILE, INDEX_FILE, LayerSpec
from marlin.formats.layouts import pack
from marlin.shards import Shards

OP = "stream"
_GENERATION = "generation_config.json"


@contextlib.contextmanager
def _values_left_out() -> Iterator[None]:
    """Parameters made inside are on the meta device; buffers have their values."""
    register = nn.Module.register_parameter

    def without(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(directory: Path, dtype: torch.dtype) -> Any:
    """The causal language model of a directory, parameters on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    with _values_left_out():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def model_bytes(directory: Path) -> int | None:
    """Bytes of a directory's safetensors; None where it has none that can be read one by one."""
    try:
        return sum(entry.nbytes for entry in checkpoint.read_headers(directory).values())
    except (CheckpointError, OSError):
        return None


def free_memory() -> int | None:
    """Bytes of host memory that programs can still take; None where the system does not say."""
    try:
        found = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")[2]
        return int(found.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None


def is_worth_it(directory: Path) -> bool:
    """Whether the model's files take more than half of the memory that is free."""
    stored, free = model_bytes(directory), free_memory()
    return stored is not None and free is not None and stored > free / 2


@dataclass
class Files:
    """A model's blocks between its files and those of the result; `Keeper` of `marlin.compress`.

    precision: of the blocks while they are compressed; dtype: of all that stays floating point. fused: the modules
    without values that experts had before they were split, by name.
    """

    source: Shards
    target: Path
    precision: torch.dtype
    dtype: torch.dtype
    shards: int
    fused: Mapping[str, nn.Module] = field(default_factory=dict)
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0
    written: int = 0

    def identity(self) -> str:
        return self.source.identity()

    def open(self, name: str, block: nn.Module) -> None:
        ours = {path: module for path, module in self.fused.items() if path.startswith(f"{name}.")}
        self.source.fill(block, name, self.precision, without=tuple(ours))
        for path, module in ours.items():
            parent, _, leaf = path.removeprefix(f"{name}.").rpartition(".")
            setattr(block.get_submodule(parent), leaf, self._split(path, copy.deepcopy(module)))

    def _split(self, path: str, fused: nn.Module) -> nn.Module:
        """The experts of this name with their values. Raises: UnsupportedError (they compute something else)."""
        self.source.fill(fused, path, self.precision)
        holder = nn.ModuleDict({"experts": fused})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", experts.ExpertsWarning)
            done = experts.split(holder)
        if not done:
            fix = "Skip them with a rule for '*.experts.*'."
            need = f"{path} must compute gated experts and nothing else"
            raise UnsupportedError(message(OP, need, "another function of its tensors", fix))
        return holder["experts"]

    def close(self, name: str, block: nn.Module, result: Any) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for layer, weight in result.weights.items():
            packed, low = pack(weight, self.dtype), result.low_rank.get(layer)
            parts = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
            if low is not None:
                parts |= {"low_rank_up": low.up.to(self.dtype), "low_rank_down": low.down.to(self.dtype)}
            tensors |= {f"{layer}.{leaf}": part for leaf, part in parts.items() if part is not None}
            rank = 0 if low is None else low.rank
            self.specs[layer] = LayerSpec(weight.kind, weight.group_size, weight.n, weight.k, rank)
        gone = {f"{layer}.weight" for layer in result.weights}
        for leaf, value in block.state_dict().items():
            if f"{name}.{leaf}" not in gone:
                tensors[f"{name}.{leaf}"] = self._cast(value)
        self.write(tensors)
        block.to("meta")

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().to(self.dtype if value.is_floating_point() else value.dtype).contiguous()

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write the next file of the result."""
        self.written += 1
        name = f"model-{self.written:05d}-of-{self.shards:05d}.safetensors"
        save_file(tensors, self.target / name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def copy(self, names: list[str]) -> None:
        """Write tensors of the source as they are, cast."""
        self.write({name: self._cast(self.source.read(name)) for name in names})

    def finish(self, config: Any) -> None:
        """Write the index and config.json."""
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
        (self.target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config.dtype = self.dtype
        body = {
            **json.loads(config.to_json_string(use_diff=True)),
            "quantization_config": checkpoint.describe(self.specs),
        }
        (self.target / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _others(model: Any, prefix: str, shards: Shards) -> list[str]:
    """Tensors of the source outside the decoder blocks that the model has and does not tie to others."""
    tied = getattr(model, "_tied_weights_keys", None) or ()
    dropped = set(tied) if model.config.get_text_config().tie_word_embeddings else set()
    wanted = set(model.state_dict()) - dropped
    return sorted(name for name in wanted & set(shards.tensors) if not name.startswith(f"{prefix}."))


@dataclass(frozen=True)
class Precision:
    """compute: dtype of the blocks while they are compressed; saved: of all that stays floating point."""

    compute: torch.dtype
    saved: torch.dtype


def compress_directory(
    source: Path | str,
    target: Path | str,
    calibration: torch.Tensor,
    recipe: Recipe,
    *,
    precision: Precision,
    tokenizer: Any = None,
    options: Options | None = None,
    overwrite: bool = False,
) -> Compressed:
    """Compress the model in directory source into directory target, whole or not at all; returns the report.

    Holds the embedding and one block, beside the calibration's hidden states. calibration: int64 token ids [samples,
    tokens]. What is finished is kept under options.resume_dir.
    Experts that lie in one tensor become linear layers, as in `marlin.compress`.
    Raises: as `marlin.compress` and `marlin.save_pretrained`; CheckpointError (tensors that have other names than the
    model's parameters), UnsupportedError (experts that are not gated linear layers).
    """
    from marlin.compress.blocks import decoder_blocks

    source, target = Path(source), Path(target)
    check_replaceable(target, overwrite, checkpoint.is_directory_of_ours)
    shards, model = Shards.open(source), skeleton(source, precision.compute)
    prefix, blocks = decoder_blocks(model)
    base = getattr(model, "base_model", model)
    whole = next(name for name, module in model.named_modules() if module is base)
    shards.fill(base, whole, precision.compute, without=(prefix,))
    others = _others(model, prefix, shards)
    fused = {name: copy.deepcopy(module) for name, module in experts.fused(model)}
    done = experts.split(model, lambda name: recipe.layer(name).kind != "skip")
    with replace_directory(target, overwrite=overwrite, is_ours=checkpoint.is_directory_of_ours) as temporary:
        ours = {name: fused[name] for name in done}
        files = Files(shards, temporary, precision.compute, precision.saved, len(blocks) + 1, ours)
        compressed = compress_model(model, calibration, recipe, options=options, keeper=files)
        files.copy(others)
        files.finish(model.config)
        if (source / _GENERATION).is_file():
            shutil.copyfile(source / _GENERATION, temporary / _GENERATION)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        api.write_card(temporary, target.name, api.card_record(compressed, recipe, None), tokenizer is not None)
    return compressed
