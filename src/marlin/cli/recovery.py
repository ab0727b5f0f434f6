"""What the commands share about recovery: its settings for a device, its progress line, and a warning without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin.cli.common import note, progress_bar

if TYPE_CHECKING:
    import torch

    from marlin.compress import Recovery, RecoveryEvent

TIMED_TOKENS = 128
# A forward pass of the dense model, and a forward and a backward one of the compressed model.
PASSES_A_STEP = 4
ON_CPU: dict[str, Any] = {"batch": 4, "length": 256, "generated_rows": 16, "generated_length": 256}


def settings(minutes: float, device: torch.device, seed: int, folder: Path | None) -> Recovery:
    """The default settings for a device; the state is kept in folder/recovery. Raises: ValueError."""
    from marlin.compress import Recovery

    small = {} if device.type == "cuda" else ON_CPU
    resume_dir = None if folder is None else folder / "recovery"
    return Recovery(minutes=minutes, device=device, seed=seed, resume_dir=resume_dir, **small)


def warn_without_gpu(teacher: Any, recovery: Recovery) -> None:
    """A note with the number of steps that the minutes are enough for, by a timed forward pass."""
    import torch

    device = torch.device(recovery.device)
    if device.type == "cuda" or recovery.minutes is None:
        return
    ids = torch.zeros(1, TIMED_TOKENS, dtype=torch.int64)
    with torch.inference_mode():
        teacher(ids)
        started = time.perf_counter()
        teacher(ids)
    rate = TIMED_TOKENS / max(time.perf_counter() - started, 1e-9) / PASSES_A_STEP
    seconds = recovery.minutes * 60 * (1 - recovery.generation_share)
    steps = max(1, round(rate * seconds / (recovery.batch * recovery.length)))
    note(
        f"recovery without a GPU: about {steps} steps of {recovery.batch} x {recovery.length} tokens in "
        f"{recovery.minutes:g} minutes; a GPU takes tens of thousands of tokens a second. Use --device cuda."
    )


def describe(event: RecoveryEvent, minutes: float) -> str:
    """The progress line: stage, figures, and the time that is left."""
    left = max(minutes * 60 - event.seconds, 0.0)
    figures = "" if event.loss is None else f", divergence {event.loss:.3f}"
    figures += "" if event.held_out is None else f", held out {event.held_out:.3f}"
    stage = {"generate": "writing text", "train": "recovering"}[event.stage]
    return f"{stage}{figures}, {int(left) // 60}:{int(left) % 60:02d} left"


def run(work: Callable[[Callable[[RecoveryEvent], None]], dict[str, Any]], minutes: float, shown: bool) -> Any:
    """work(progress) under a progress bar; returns what it returns."""
    with progress_bar(shown) as display:
        task = display.add_task("recovering", total=100)

        def show(event: RecoveryEvent) -> None:
            display.update(task, completed=int(100 * event.share), description=describe(event, minutes))

        return work(show)


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What the model card shows of a recovery's report."""
    return {f"recovery, {name}": value for name, value in summary(report).items()}


def sentence(shown: dict[str, Any]) -> str:
    """A summary in words."""
    change = f"{shown['divergence_before']:.4f} to {shown['divergence']:.4f} nats a token"
    return f"recovered in {shown['seconds']:.0f} s: divergence from the dense model, held out, {change}"


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a recovery's report."""
    names = ("divergence_before", "divergence", "steps", "tokens", "generated_tokens", "seconds")
    return {name: report[name] for name in names}
