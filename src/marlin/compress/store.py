"""Finished blocks on disk, so that a compression that was killed goes on where it stopped.

Owns the resume folder: `fingerprint.json` and one `block_00012.safetensors` per finished block (canonical tensors, and
its report rows in the header). Every file is written aside and renamed. A folder of another model, recipe,
calibration or set of options is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from marlin.compress.report import BlockReport, LayerReport, write_text
from marlin.errors import CheckpointError, message
from marlin.formats import CompressedWeight, DenseInt4Weight, LowRank, Weight

VERSION = 1
SAMPLED = 4096
OP = "resume"
OTHER = "other:"


@dataclass
class BlockResult:
    """weights: canonical weights; floats: dense fp32 values of layers that have no packed form; low_rank: corrections
    of some weights; by full module name. others: norms and biases that training changed, by full parameter name.
    trained: how the block was trained, or None."""

    weights: dict[str, Weight]
    floats: dict[str, torch.Tensor]
    report: list[LayerReport]
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: BlockReport | None = None


def fingerprint(
    model: nn.Module, calibration: torch.Tensor, recipe_json: str, options: dict[str, Any], identity: str | None = None
) -> dict[str, str]:
    """Hashes of what a result depends on; of each parameter shape, dtype and up to 4096 evenly spaced values.

    identity: of a model whose values are elsewhere.
    """
    digest = hashlib.sha256((identity or "").encode())
    for name, tensor in sorted(model.state_dict().items() if identity is None else ()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLED)
        values = flat[::step][:SAMPLED].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.numpy().tobytes())
    tokens = hashlib.sha256(calibration.cpu().contiguous().numpy().tobytes())
    tokens.update(str(tuple(calibration.shape)).encode())
    return {
        "version": str(VERSION),
        "model": digest.hexdigest(),
        "calibration": tokens.hexdigest(),
        "recipe": hashlib.sha256(recipe_json.encode()).hexdigest(),
        "options": json.dumps(options, sort_keys=True),
    }


class Store:
    """A resume folder. Raises on opening: CheckpointError (it belongs to another run, or is unreadable), OSError."""

    def __init__(self, folder: str | Path, identity: dict[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "fingerprint.json"
        if not path.exists():
            write_text(path, json.dumps(identity, indent=2))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._refused("fingerprint.json must be readable JSON", str(error)) from error
        differs = sorted(key for key in identity if not isinstance(found, dict) or found.get(key) != identity[key])
        if differs:
            raise self._refused("the folder must belong to the same run", f"another {', '.join(differs)}")

    def _refused(self, requirement: str, got: str) -> CheckpointError:
        return CheckpointError(
            message(OP, requirement, f"{got} in {self.folder}", "Choose another resume_dir, or delete this one.")
        )

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:05d}.safetensors"

    def save(self, index: int, result: BlockResult) -> None:
        """Keep a finished block."""
        tensors: dict[str, torch.Tensor] = {}
        groups: dict[str, int] = {}
        for name, weight in result.weights.items():
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = weight.codes.cpu(), weight.scales.cpu()
            if isinstance(weight, CompressedWeight):
                tensors[f"{name}.positions"] = weight.positions.cpu()
            groups[name] = weight.group_size
        for name, low in result.low_rank.items():
            tensors[f"{name}.low_rank_up"], tensors[f"{name}.low_rank_down"] = low.up.cpu(), low.down.cpu()
        tensors.update({f"{name}.dense": value.cpu().contiguous() for name, value in result.floats.items()})
        tensors.update({f"{OTHER}{name}": value.cpu().contiguous() for name, value in result.others.items()})
        header = {
            "report": json.dumps([asdict(row) for row in result.report]),
            "groups": json.dumps(groups),
        }
        if result.trained is not None:
            header["trained"] = json.dumps(asdict(result.trained))
        path = self._path(index)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, aside, metadata=header)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, index: int) -> BlockResult | None:
        """A kept block, or None. Raises: CheckpointError (the file is damaged)."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            groups = json.loads(header["groups"])
            report = [LayerReport(**row) for row in json.loads(header["report"])]
            trained = BlockReport(**json.loads(header["trained"])) if "trained" in header else None
            weights = {name: _weight(tensors, name, size) for name, size in groups.items()}
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(
                message(OP, f"{path.name} must be whole", str(error), f"Delete {path} and start again.")
            ) from error
        others = {key.removeprefix(OTHER): tensors.pop(key) for key in list(tensors) if key.startswith(OTHER)}
        floats = {key.removesuffix(".dense"): value for key, value in tensors.items() if key.endswith(".dense")}
        ranked = [name for name in groups if f"{name}.low_rank_up" in tensors]
        low = {name: LowRank(tensors[f"{name}.low_rank_up"], tensors[f"{name}.low_rank_down"]) for name in ranked}
        return BlockResult(weights, floats, report, low, others, trained)


def _weight(tensors: dict[str, torch.Tensor], name: str, group_size: int) -> Weight:
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    positions = tensors.get(f"{name}.positions")
    if positions is None:
        return DenseInt4Weight(codes, scales, group_size).validate()
    return CompressedWeight(codes, positions, scales, group_size).validate()
