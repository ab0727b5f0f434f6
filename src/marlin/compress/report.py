"""What came of each layer: `LayerReport`, the result of a compression, and progress events.

Owns their fields and the JSON form. Knows nothing of how the numbers were made.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from marlin.formats import LowRank, Weight

POSITION_BITS = 1.0
FLOAT_BITS = 16.0
_ERRORS = ("error_before", "error_after")


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    relative_error: squared error of its outputs over their square, on the calibration inputs (None when skipped); where
    the recipe corrects, compared with the outputs of the corrected weight. Of the layer as solved, before its block is
    trained.
    damping: the share used in the end. tokens: calibration tokens that reached it. seconds: of the solver, shared
    evenly by weight count among layers solved together. note: anything that differs from what the recipe asked for.
    low_rank: rank of its low-rank correction.
    """

    name: str
    kind: str
    method: str
    n: int
    k: int
    group_size: int
    relative_error: float | None
    damping: float | None
    tokens: int
    seconds: float
    note: str = ""
    low_rank: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense weight, scales (16 bits), positions and low-rank correction included; 16 for what is
        left alone."""
        group = self.group_size if self.group_size > 0 else self.k
        thin = FLOAT_BITS * self.low_rank * (self.n + self.k) / (self.n * self.k)
        return {
            "w4a16_sp24": 2.0 + POSITION_BITS + FLOAT_BITS / group + thin,
            "w4a16_dense": 4.0 + FLOAT_BITS / group + thin,
            "sp24": 8.0 + POSITION_BITS,
        }.get(self.kind, 16.0)


@dataclass(frozen=True)
class BlockReport:
    """The reconstruction of one block.

    error_before, error_after: squared distance of its outputs from the dense model's over the square of those, mean
    over the tokens of the held-out windows. steps: taken; best_step: the one whose state was kept, 0 for the block as
    it was solved. seconds: of the training. note: why something was left out.
    """

    name: str
    error_before: float
    error_after: float
    steps: int
    best_step: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Event:
    """Progress: `done` of `total` blocks are finished.

    stage: "capture", "block", "resumed", or "reconstruct" while a block is trained. layers: of the finished block;
    block: its reconstruction. step, error: of the training so far, error as in `BlockReport`.
    """

    stage: str
    done: int
    total: int
    seconds: float
    layers: tuple[LayerReport, ...] = ()
    block: BlockReport | None = None
    step: int = 0
    error: float | None = None


Progress = Callable[[Event], None]


@dataclass
class Compressed:
    """weights: canonical weight by module name (kinds that have one). report: one row per linear layer. low_rank: what
    is added to some of the weights. blocks: one row per block that was trained."""

    weights: dict[str, Weight]
    report: list[LayerReport]
    seconds: float = 0.0
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)

    def bits_per_weight(self) -> float:
        """Mean stored bits over the weights of the decoder's linear layers."""
        total = sum(row.n * row.k for row in self.report)
        return sum(row.bits_per_weight * row.n * row.k for row in self.report) / max(total, 1)

    def report_json(self) -> str:
        """The report as JSON."""
        rows = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.report]
        body = {"version": 1, "seconds": self.seconds, "bits_per_weight": self.bits_per_weight(), "layers": rows}
        if self.blocks:
            body["reconstruction"] = [asdict(row) for row in self.blocks]
            body["calibration"] = {f"reconstruction, {key}": value for key, value in self.reconstruction().items()}
        return json.dumps(body, indent=2)

    def reconstruction(self) -> dict[str, Any]:
        """What is shown of the trained blocks: their number, the steps of each, mean errors; empty where none was."""
        if not self.blocks:
            return {}
        means = {name: sum(getattr(row, name) for row in self.blocks) / len(self.blocks) for name in _ERRORS}
        seconds = sum(row.seconds for row in self.blocks)
        return {"blocks": len(self.blocks), "steps": self.blocks[0].steps, **means, "seconds": round(seconds, 1)}

    def save_report(self, path: str | Path) -> None:
        """Write the JSON report aside and rename it."""
        write_text(Path(path), self.report_json())


def write_text(path: Path, text: str) -> None:
    """Write aside in the same folder, then rename, so that a reader never sees half a file."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
