"""How a recovery runs: `Recovery`, its checks, and the events and warnings that it gives.

Owns names, defaults and rules. Knows nothing of how anything is done.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from marlin.compress.options import Options
from marlin.errors import require

LOWEST_RATE, HIGHEST_RATE, RATE_PER_DIVERGENCE = 3e-4, 2e-3, 2.5e-3


class RecoveryWarning(UserWarning):
    """Recovery goes on, but not as asked: without compilation, or without generated text."""


@dataclass(frozen=True)
class RecoveryEvent:
    """Progress. stage: "generate" or "train"; share: of the stage that is done, 0..1; seconds: since the start.

    loss: mean over the last steps, nats a token; held_out: the last validation; None before there is one.
    """

    stage: str
    share: float
    seconds: float
    step: int = 0
    loss: float | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class Recovery:
    """How a recovery runs.

    minutes: of everything, generation and compilation included; or steps: of the optimizer, which repeats exactly (one
    of the two). learning_rate: of Adam, at its highest; cosine to zero after `warmup` (a share of the run); None: in
    proportion to the divergence at the start, within limits (`rate_for`).
    learn_scales: train the scales too. relative: a weight's learning rate is proportional to its group's scale, with
    learning_rate its mean; otherwise all weights share it.
    batch, length: rows and tokens of a step, which is taken in `accumulate` parts.
    generated_tokens: how many the dense model writes at most, in at most generation_share of the minutes;
    generated_rows of generated_length tokens at a time. generated_share: of the rows of a batch. temperature: of the
    loss. compile: "auto" (on a GPU with Triton), "always", "never". device, seed, autocast: as in `Options`.
    begin: the token that all texts of the model begin with; it takes the place of the first of every window. dtype:
    that norms and biases are saved in; they are rounded to it at the end. validations: of a run.
    resume_dir: where the state is kept every checkpoint_minutes, and taken from.
    """

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.04
    learn_scales: bool = True
    relative: bool = True
    batch: int = 16
    length: int = 1024
    accumulate: int = 1
    generated_tokens: int = 32_000_000
    generation_share: float = 0.15
    generated_share: float = 0.9
    generated_rows: int = 8192
    generated_length: int = 512
    temperature: float = 1.0
    validations: int = 16
    compile: str = "auto"
    device: str | torch.device = "cpu"
    seed: int = 0
    autocast: str = "auto"
    begin: int | None = None
    dtype: torch.dtype = torch.float16
    resume_dir: str | Path | None = None
    checkpoint_minutes: float = 5.0
    progress: Callable[[RecoveryEvent], None] | None = None

    def __post_init__(self) -> None:
        op = "Recovery"
        given = (self.minutes is None) != (self.steps is None)
        require(given, op, "one of minutes and steps must be given", f"minutes={self.minutes}, steps={self.steps}")
        for name in ("minutes", "steps", "learning_rate", "batch", "accumulate", "temperature", "validations"):
            value = getattr(self, name)
            require(value is None or value > 0, op, f"{name} must be above 0", f"{value}")
        require(self.length >= 2, op, "length must be at least 2", f"length={self.length}")
        for name in ("warmup", "generation_share", "generated_share"):
            value = getattr(self, name)
            require(0 <= value < 1, op, f"{name} must lie in 0..1, 1 excluded", f"{name}={value}")
        require(self.generated_tokens >= 0, op, "generated_tokens must not be negative", f"{self.generated_tokens}")
        choices = ("auto", "always", "never")
        require(self.compile in choices, op, f"compile must be one of {choices}", repr(self.compile))
        require(
            self.batch % self.accumulate == 0,
            op,
            "batch must be a multiple of accumulate",
            f"batch={self.batch}, accumulate={self.accumulate}",
        )

    def autocast_dtype(self, model: nn.Module) -> torch.dtype | None:
        """As `Options.autocast_dtype`, for a model whose training copy is float32."""
        return Options(self.device, autocast=self.autocast).autocast_dtype(nn.Linear(1, 1))

    def rate_for(self, divergence: float) -> float:
        """The highest learning rate of a run that starts at this divergence, in nats a token.

        Why less for a near start: rounding that changes at every step costs a divergence of its own while the rate is
        high, and a run must not spend its time on coming back from it.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return min(max(LOWEST_RATE, RATE_PER_DIVERGENCE * divergence), HIGHEST_RATE)

    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        if self.compile != "auto":
            return self.compile == "always"
        return torch.device(self.device).type == "cuda" and importlib.util.find_spec("triton") is not None
