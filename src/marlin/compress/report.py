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

from marlin.formats import LowRank, Weight

POSITION_BITS = 1.0
FLOAT_BITS = 16.0


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    relative_error: squared error of its outputs over their square, on the calibration inputs (None when skipped); where
    the recipe corrects, compared with the outputs of the corrected weight.
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
class Event:
    """Progress: `done` of `total` blocks are finished. stage: "capture", "block" or "resumed"; layers: of the block."""

    stage: str
    done: int
    total: int
    seconds: float
    layers: tuple[LayerReport, ...] = ()


Progress = Callable[[Event], None]


@dataclass
class Compressed:
    """weights: canonical weight by module name (kinds that have one). report: one row per linear layer. low_rank: what
    is added to some of the weights."""

    weights: dict[str, Weight]
    report: list[LayerReport]
    seconds: float = 0.0
    low_rank: dict[str, LowRank] = field(default_factory=dict)

    def bits_per_weight(self) -> float:
        """Mean stored bits over the weights of the decoder's linear layers."""
        total = sum(row.n * row.k for row in self.report)
        return sum(row.bits_per_weight * row.n * row.k for row in self.report) / max(total, 1)

    def report_json(self) -> str:
        """The report as JSON."""
        rows = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.report]
        body = {"version": 1, "seconds": self.seconds, "bits_per_weight": self.bits_per_weight(), "layers": rows}
        return json.dumps(body, indent=2)

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
