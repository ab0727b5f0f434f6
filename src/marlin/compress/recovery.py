"""Recovery: train the codes, scales and norms of a compressed model to predict what the dense model predicts.

Owns the order of the steps and the text that the dense model writes. The masks stay as they are, the loss is the
divergence from the dense model over its whole vocabulary, and what comes out are canonical weights whose dense values
were measured once more at the end. Data is the calibration text and text that the dense model writes itself; the tail
of the calibration text is held out, and the best state on it is kept. Everything trains at once, so the model, its
dense original and about 24 bytes a weight must fit on one device.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from marlin.compress.blocks import module_device
from marlin.compress.calibration import begun
from marlin.compress.recovery_settings import Recovery, RecoveryEvent, RecoveryWarning
from marlin.compress.recovery_state import RecoveryState
from marlin.compress.sampling import sample
from marlin.compress.texts import OP, Batches, prompts, split_held_out
from marlin.compress.training import Run, student
from marlin.errors import message, require
from marlin.formats import Weight

# A latent, its gradient, two moments, its best state, the mask, and copies in 16 bits.
BYTES_PER_WEIGHT = 24


@dataclass
class Recovered:
    """weights: by module name. report: what was done and measured, JSON."""

    weights: dict[str, Weight]
    report: dict[str, Any] = field(default_factory=dict)


def generate_text(
    teacher: Any, stream: torch.Tensor, recovery: Recovery, seconds: float = float("inf")
) -> torch.Tensor:
    """Text that the model writes: int64 [any], at most recovery.generated_tokens, within about `seconds`.

    Sampled in bfloat16 on a GPU, fewer rows at a time where memory ends. stream: text whose pieces begin some of it.
    """
    device = torch.device(recovery.device)
    started = time.monotonic()
    writer = teacher
    if device.type == "cuda" and next(teacher.parameters()).dtype == torch.float32:
        writer = copy.deepcopy(teacher).to(device, torch.bfloat16)
    rows, length, found, total, index = recovery.generated_rows, recovery.generated_length, [], 0, 0
    vocabulary = int(teacher.get_input_embeddings().weight.shape[0])
    begin = getattr(getattr(teacher, "config", None), "bos_token_id", None)

    def tell(done: int, length: int) -> None:
        if recovery.progress is not None:
            share = (total + rows * done) / max(recovery.generated_tokens, 1)
            spent = time.monotonic() - started
            recovery.progress(RecoveryEvent("generate", min(max(share, spent / seconds), 1.0), spent))

    while total < recovery.generated_tokens and time.monotonic() - started < seconds:
        rows = min(rows, -(-(recovery.generated_tokens - total) // length))
        beginnings = prompts(stream, vocabulary, rows, index, recovery.seed, begin, recovery.begin)
        seed = recovery.seed * 1_000_003 + index
        try:
            ids = sample(writer, beginnings, length, seed=seed, deadline=started + seconds, progress=tell)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if rows < 2:
                raise
            rows //= 2
            continue
        found.append(ids.flatten())
        total, index = total + ids.numel(), index + 1
    if device.type == "cuda":
        del writer
        torch.cuda.empty_cache()
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def recover(
    model: Any,
    teacher: Any,
    weights: Mapping[str, Weight],
    token_ids: torch.Tensor,
    *,
    recovery: Recovery,
    generated: torch.Tensor | None = None,
) -> Recovered:
    """Train the compressed model's weights against the dense model's predictions; returns the new weights.

    model: the compressed model, whose modules named in `weights` are linear layers; a `torch.nn.Linear` among them
    gets the new dense values, norms and biases are changed in place. teacher: the dense model, moved to the device
    and frozen. token_ids: int64 [any], text. generated: what `generate_text` gave; None generates here.
    Raises: ValueError (text too short, names or shapes of weights, a loss that is not finite, memory), TypeError,
    CheckpointError (resume_dir of another run, or damaged).
    """
    started = time.monotonic()
    if token_ids.dtype != torch.int64:
        raise TypeError(message(OP, "token_ids must be int64", str(token_ids.dtype), "Pass tokenizer ids."))
    require(len(weights) > 0, OP, "the model must have compressed layers", "none", "Compress it first.")
    device = torch.device(recovery.device)
    train, held_out = split_held_out(token_ids.flatten(), recovery.length, recovery.batch // recovery.accumulate)
    held_out = begun(held_out, recovery.begin)
    homes = module_device(model), module_device(teacher)
    state = RecoveryState.open(recovery, teacher, weights, token_ids)
    _check_memory(device, weights)
    teacher.to(device).eval().requires_grad_(False)
    if generated is None:
        generated = state.generated(lambda: generate_text(teacher, train, recovery, _generation_seconds(recovery)))
    with student(model, weights, recovery) as trained:
        batches = _batches(train, generated, recovery)
        run = Run(model, teacher, trained, batches, held_out.to(device), recovery, started)
        report = run.train(state)
    report["generated_tokens"] = int(generated.numel())
    result = Recovered(trained.weights, report)
    model.to(homes[0])
    teacher.to(homes[1])
    return result


def _generation_seconds(recovery: Recovery) -> float:
    return float("inf") if recovery.minutes is None else recovery.minutes * 60 * recovery.generation_share


def _batches(text: torch.Tensor, generated: torch.Tensor, recovery: Recovery) -> Batches:
    """What is drawn from, and how often."""
    streams, shares = [text], [1.0]
    if recovery.generated_share > 0 and recovery.generated_tokens > 0:
        if generated.numel() >= 4 * recovery.length:
            streams, shares = [text, generated], [1 - recovery.generated_share, recovery.generated_share]
        else:
            got = f"{generated.numel()} generated tokens"
            fix = "Training on the calibration text alone."
            warnings.warn(message(OP, "generated text must fill 4 windows", got, fix), RecoveryWarning, stacklevel=3)
    device = torch.device(recovery.device)
    streams = [stream.to(device) for stream in streams]
    return Batches(streams, shares, recovery.length, recovery.batch, recovery.seed, recovery.begin)


def _check_memory(device: torch.device, weights: Mapping[str, Weight]) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    needed = BYTES_PER_WEIGHT * sum(weight.n * weight.k for weight in weights.values())
    got = f"{free / 2**30:.1f} GiB free"
    fix = "Use a larger GPU, or a recipe that compresses fewer layers."
    require(free > needed, OP, f"the weights' training state needs {needed / 2**30:.1f} GiB on the device", got, fix)
