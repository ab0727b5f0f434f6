"""The state of a recovery on disk, so that one that was killed goes on where it stopped.

Owns the folder: `fingerprint.json`, `generated.safetensors` (tokens that the dense model wrote) and `state.safetensors`
(trained tensors, their best state, the optimizer's moments). Every file is written aside and renamed. Knows nothing of
losses and schedules.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from marlin.compress.store import Store, fingerprint
from marlin.errors import CheckpointError, message
from marlin.formats import CompressedWeight, Weight

NOT_NUMERIC = ("progress", "resume_dir", "checkpoint_minutes")


@dataclass
class State:
    """Where a run stands. seconds: trained; budget: seconds of training in all; first, lowest: held-out divergence;
    history: [step, divergence] of each validation; best: the trained tensors at best_step, where they are trained."""

    step: int
    seconds: float
    budget: float
    first: float
    lowest: float
    best_step: int
    history: list[list[float]]
    best: list[torch.Tensor] = field(default_factory=list)

    def keep(self, parameters: list[nn.Parameter]) -> None:
        """Take the tensors as they are for the best."""
        if not self.best:
            self.best = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]
        for kept, parameter in zip(self.best, parameters, strict=True):
            kept.copy_(parameter.detach())


def _identity(recovery: Any, teacher: nn.Module, weights: Mapping[str, Weight], ids: torch.Tensor) -> dict[str, str]:
    numeric = {key: str(value) for key, value in vars(recovery).items() if key not in NOT_NUMERIC}
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.kind} {weight.group_size} {weight.n} {weight.k}".encode())
        parts = [weight.codes, weight.scales.float()]
        parts += [weight.positions] if isinstance(weight, CompressedWeight) else []
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return fingerprint(teacher, ids, digest.hexdigest(), numeric)


class RecoveryState:
    """A resume folder, or none: then nothing is kept and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, recovery: Any, teacher: nn.Module, weights: Mapping[str, Weight], ids: torch.Tensor) -> RecoveryState:
        """The folder recovery.resume_dir. Raises: CheckpointError (it belongs to another run), OSError."""
        if recovery.resume_dir is None:
            return cls(None)
        Store(recovery.resume_dir, _identity(recovery, teacher, weights, ids))
        return cls(Path(recovery.resume_dir))

    def _write(self, name: str, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        assert self.folder is not None
        aside = self.folder / f".{name}.{os.getpid()}"
        try:
            save_file(tensors, aside, metadata=header)
            os.replace(aside, self.folder / name)
        finally:
            aside.unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        if self.folder is None or not (self.folder / name).exists():
            return None
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            fix = f"Delete {path} and start again."
            raise CheckpointError(message("recover", f"{path.name} must be whole", str(error), fix)) from error

    def generated(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tokens kept, or those made now."""
        found = self._read("generated.safetensors")
        if found is not None:
            return found[0]["ids"]
        ids = make()
        if self.folder is not None and ids.numel():
            self._write("generated.safetensors", {"ids": ids.contiguous()}, {})
        return ids

    def save(self, state: State, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the state of a run."""
        if self.folder is None:
            return
        tensors = {f"now.{i}": p.detach().cpu().contiguous() for i, p in enumerate(parameters)}
        tensors |= {f"best.{i}": p.cpu().contiguous() for i, p in enumerate(state.best)}
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"adam.{index}.{key}"] = value.detach().cpu().contiguous()
        plain = {key: value for key, value in asdict(_without_tensors(state)).items() if key != "best"}
        self._write("state.safetensors", tensors, {"state": json.dumps(plain)})

    def load(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> State | None:
        """Put a kept state into parameters and optimizer; None where there is none. Raises: CheckpointError."""
        found = self._read("state.safetensors")
        if found is None:
            return None
        tensors, header = found
        try:
            state = State(**json.loads(header["state"]))
            state.best = [tensors[f"best.{i}"].to(each.device) for i, each in enumerate(parameters)]
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("adam."):
                    _, index, name = key.split(".")
                    moments.setdefault(int(index), {})[name] = value
            with torch.no_grad():
                for position, parameter in enumerate(parameters):
                    parameter.copy_(tensors[f"now.{position}"])
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            fix = f"Delete {self.folder} and start again."
            raise CheckpointError(message("recover", "state.safetensors must fit the run", str(error), fix)) from error
        return state


def _without_tensors(state: State) -> State:
    """The state without its tensors."""
    return State(
        state.step, state.seconds, state.budget, state.first, state.lowest, state.best_step, list(state.history)
    )
