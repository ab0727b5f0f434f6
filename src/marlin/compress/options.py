"""How a compression runs: `Options` and its checks.

Owns names, defaults and rules of what belongs to a run and not to a recipe. Knows nothing of how anything is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from marlin.compress.report import Progress
from marlin.errors import message, require

OP = "Options"


@dataclass(frozen=True)
class Options:
    """How a compression runs; what it does to which layer is the recipe's matter.

    device: where blocks and Hessians live while they are worked on. Several, as a sequence or in one string with
    commas ("cuda:0,cuda:1"), take shares of the calibration windows; the first also solves and trains.
    seed: seeds torch's generator, for models whose blocks draw random numbers, and the order of reconstruction.
    batch: calibration rows in one forward pass of a block.
    sequential: layers of a block are solved in the order of their calls, each calibrated with what the compressed
    ones before it in the same block produce; one more pass through the block for each input that layers share. None:
    where the recipe corrects.
    autocast: dtype of the forward passes' matrix products: "auto" (bfloat16 for float32 models where the device has
    it), "bfloat16", or "none".
    reconstruct: steps of training for each compressed block (0: none), so that its outputs come near to the dense
    model's; masks stay. reconstruct_rate: how far a weight moves in a step at most, in units of its scale.
    resume_dir: where finished blocks are kept, and taken from; None keeps nothing.
    progress: called with an `Event` after the capture, while a block is trained, and after each block.
    """

    device: str | torch.device | Sequence[str | torch.device] = "cpu"
    seed: int = 0
    batch: int = 4
    sequential: bool | None = None
    autocast: str = "auto"
    reconstruct: int = 0
    reconstruct_rate: float = 0.06
    resume_dir: str | Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, OP, "batch must be at least 1", f"batch={self.batch}")
        choices = ("auto", "bfloat16", "none")
        require(self.autocast in choices, OP, f"autocast must be one of {choices}", repr(self.autocast))
        whole = isinstance(self.reconstruct, int) and not isinstance(self.reconstruct, bool) and self.reconstruct >= 0
        require(whole, OP, "reconstruct must be a number of steps, at least 0", f"reconstruct={self.reconstruct}")
        fits = 0 < self.reconstruct_rate <= 1
        require(fits, OP, "reconstruct_rate must lie in 0..1, 0 excluded", f"reconstruct_rate={self.reconstruct_rate}")
        devices = self.devices
        require(len(devices) > 0, OP, "device must name at least one device", repr(self.device))
        if len(devices) > 1:
            shown = ", ".join(map(str, devices))
            require(len({each.type for each in devices}) == 1, OP, "devices must be of one type", shown)
            indices = [each.index or 0 for each in devices if each.type != "cpu"]
            require(len(indices) == len(set(indices)), OP, "each GPU must be named once", shown)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices, the first of which solves. Raises: ValueError (a name that torch does not know)."""
        given = self.device
        names = given.split(",") if isinstance(given, str) else [given] if isinstance(given, torch.device) else given
        try:
            return tuple(torch.device(name.strip() if isinstance(name, str) else name) for name in names)
        except RuntimeError as error:
            fix = "Use names like cpu or cuda:0, several with commas between them."
            raise ValueError(message(OP, "device must name devices of torch", repr(given), fix)) from error

    @property
    def first_device(self) -> torch.device:
        """Where layers are solved and blocks are trained."""
        return self.devices[0]

    def autocast_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype that `autocast` stands for with this model on these devices."""
        if self.autocast != "auto":
            return torch.bfloat16 if self.autocast == "bfloat16" else None
        if next(model.parameters()).dtype != torch.float32:
            return None
        if self.first_device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return torch.bfloat16 if fast is not None and fast() else None
