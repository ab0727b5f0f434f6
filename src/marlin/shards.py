"""Tensors of a model directory, read one by one under the names of the model's parameters.

Owns which tensors of the files a parameter is made of: the one of its name, or, where transformers holds all experts of
a block in one tensor, those of each expert in published checkpoints. Knows nothing of what is done with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from marlin.formats import checkpoint
from marlin.formats.published import CONFIG_KEYS
from marlin.formats.safetensors_header import TensorEntry, parse_json, refuse

OP = "stream"
ROWS_READ = 4
_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)")
# Names of an expert's layers in published checkpoints: those of most families, and Mixtral's.
_LISTED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Mixtral's name of the module that transformers calls mlp.
_ALIAS = (".mlp.", ".block_sparse_moe.")


@dataclass
class Shards:
    """Tensors of a directory, read one by one."""

    directory: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: Path) -> Shards:
        """The directory's tensors, headers checked. Raises: CheckpointError (also of weights that are quantized)."""
        config = parse_json((directory / checkpoint.CONFIG_FILE).read_bytes(), checkpoint.CONFIG_FILE)
        for key in CONFIG_KEYS:
            if isinstance(config, dict) and config.get(key):
                fix = "Compress the 16-bit model that it was made of."
                raise refuse(f"{OP} {directory}", "the model must not be quantized", f"{key} in config.json", fix)
        return cls(directory, checkpoint.read_headers(directory))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One parameter, on the CPU, cast to dtype. Raises: CheckpointError (the files have nothing for it)."""
        for stored in (name, name.replace(*_ALIAS)):
            if stored in self.tensors:
                tensor = self._stored(stored)
                return tensor if dtype is None else tensor.to(dtype)
            names = self._experts(stored)
            if names:
                return self._assembled(names, dtype)
        fix = "The model's class renames tensors on loading: compress it without --stream."
        requirement = "the files must have a tensor for each parameter and buffer"
        raise refuse(f"{OP} {self.directory}", requirement, f"none named {name!r}", fix)

    def _stored(self, name: str) -> torch.Tensor:
        with safe_open(self.tensors[name].file, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _experts(self, name: str) -> list[tuple[str, ...]]:
        """Names of the tensors that a parameter of all experts is made of: for each expert, one above the other."""
        found = _FUSED.fullmatch(name)
        if found is None:
            return []
        for leaves in _LISTED[found["leaf"]]:
            names: list[tuple[str, ...]] = []
            while True:
                parts = tuple(f"{found['experts']}.{len(names)}.{leaf}.weight" for leaf in leaves)
                if parts[0] not in self.tensors:
                    break
                names.append(parts)
            if names:
                return names
        return []

    def _assembled(self, names: list[tuple[str, ...]], dtype: torch.dtype | None) -> torch.Tensor:
        """[E, rows, K] from each expert's tensors, [rows of a part, K]. Raises: CheckpointError (missing, uneven)."""
        whole: torch.Tensor | None = None
        for index, parts in enumerate(names):
            lacking = [part for part in parts if part not in self.tensors]
            if lacking:
                need = "an expert must have all its tensors"
                raise refuse(f"{OP} {self.directory}", need, f"none named {lacking[0]!r}")
            one = torch.cat([self._stored(part) for part in parts])
            if whole is None:
                whole = torch.empty(len(names), *one.shape, dtype=dtype or one.dtype)
            if one.shape != whole.shape[1:]:
                need = f"all experts must have shape {list(whole.shape[1:])}, that of the first"
                raise refuse(f"{OP} {self.directory}", need, f"{list(one.shape)} for {parts[0]!r}")
            whole[index] = one
        assert whole is not None
        return whole

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, without: tuple[str, ...] = ()) -> None:
        """Give the module's parameters and persistent buffers their values, cast to dtype; nothing below `without`.

        Raises: CheckpointError (nothing in the files, or another shape).
        """
        for name, part in module.named_modules():
            path = ".".join(each for each in (prefix, name) if each)
            if any(f"{path}.".startswith(f"{each}.") for each in without):
                continue
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    value = self.read(f"{path}.{leaf}", dtype)
                    if value.shape != parameter.shape:
                        need = f"{path}.{leaf} must have shape {list(parameter.shape)}, that of the model"
                        raise refuse(f"{OP} {self.directory}", need, f"{list(value.shape)}")
                    part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            for leaf, buffer in part._buffers.items():
                if buffer is not None and leaf not in part._non_persistent_buffers_set:
                    part._buffers[leaf] = self.read(f"{path}.{leaf}")

    def identity(self) -> str:
        """A hash of names, shapes, dtypes and the first rows of every tensor."""
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                for file in {entry.file for entry in self.tensors.values()}
            }
            for name, entry in sorted(self.tensors.items()):
                digest.update(f"{name} {entry.shape} {entry.dtype}".encode())
                if not entry.shape or 0 in entry.shape:
                    continue
                rows = files[entry.file].get_slice(name)[: ROWS_READ if len(entry.shape) > 1 else None]
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
