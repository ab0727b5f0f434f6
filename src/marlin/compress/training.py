"""The training run of a recovery: the student's trainable tensors, the loop and its schedule.

Owns which tensors are trained and what becomes of the others, compilation, validation and the choice of the best state.
Knows nothing of where the tokens come from.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from marlin.compress.blocks import decoder_blocks
from marlin.compress.distill import Distance, chunk_kl
from marlin.compress.graphs import record
from marlin.compress.latent import mean_scale, put_latents, take_latents
from marlin.compress.recovery_settings import Recovery, RecoveryEvent, RecoveryWarning
from marlin.compress.recovery_state import RecoveryState, State
from marlin.compress.sampling import one_sequence_a_row
from marlin.compress.texts import OP, Batches
from marlin.errors import message, require
from marlin.formats import Weight

SYNC_EVERY = 8


@dataclass
class Trained:
    """Trainable tensors of the student in a fixed order, by group: latents, scales, and the rest (norms, biases)."""

    groups: dict[str, list[nn.Parameter]]
    latent_rate: float
    weights: dict[str, Weight] = field(default_factory=dict)

    def all(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups.values() for parameter in group]


@contextlib.contextmanager
def student(model: Any, weights: Mapping[str, Weight], recovery: Recovery) -> Iterator[Trained]:
    """The model in float32 with latents in the place of compressed layers; on leaving, as it was, with new values."""
    model.eval()
    mean = mean_scale(weights)
    originals = put_latents(model, weights, recovery.learn_scales, None if recovery.relative else mean)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Why not model.float(): transformers refuses it for a quantized model, whose layers are latents now.
    nn.Module.to(model, recovery.device, torch.float32)
    # Why: the first block is then called like all others, and compiled with them.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    trained = Trained({"latent": [], "scale": [], "other": []}, 1.0 / max(mean, 1e-8))
    for name, parameter in model.named_parameters():
        kind = {"latent": "latent", "log_scale": "scale"}.get(name.rpartition(".")[2], "other")
        wanted = recovery.learn_scales if kind == "scale" else kind == "latent" or parameter.ndim == 1
        parameter.requires_grad_(wanted)
        if wanted:
            trained.groups[kind].append(parameter)
    try:
        yield trained
    finally:
        hook.remove()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(flags[name])
            if parameter.ndim == 1:
                parameter.data = parameter.data.to(recovery.dtype)
            parameter.data = parameter.data.to(dtypes[name])
        for name, buffer in model.named_buffers():
            if name in dtypes and buffer.dtype != dtypes[name]:
                buffer.data = buffer.data.to(dtypes[name])
        trained.weights = take_latents(model, originals)


@dataclass
class Run:
    """One training run."""

    model: Any
    teacher: Any
    trained: Trained
    batches: Batches
    held_out: torch.Tensor
    recovery: Recovery
    started: float

    def __post_init__(self) -> None:
        self.device = torch.device(self.recovery.device)
        self.dtype = self.recovery.autocast_dtype(self.model)
        self.recorded: Callable[..., tuple[torch.Tensor, ...]] | None = None
        with self.autocast():
            self.distance = Distance.between(
                self.model, self.teacher, self.held_out[:1, :16], self.recovery.temperature
            )
        groups = [
            {"params": group, "factor": self.trained.latent_rate if name == "latent" else 1.0}
            for name, group in self.trained.groups.items()
            if group
        ]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def compile(self, on: bool) -> None:
        """Compile the blocks of both models and the loss, or undo it.

        Why block by block: all blocks of a model share one compiled text, which takes seconds and not minutes.
        """
        # Why the teacher's name: the student's blocks hold no torch.nn.Linear now.
        name, _ = decoder_blocks(self.teacher)
        for model in (self.model, self.teacher):
            for block in model.get_submodule(name).children():
                if on:
                    block.compile()
                else:
                    block._compiled_call_impl = None
        self.distance.chunk = torch.compile(chunk_kl) if on else chunk_kl

    def gradients(self, step: int) -> torch.Tensor:
        """Forward and backward of batch `step`; returns the loss."""
        ids = self.batches(step)
        return self._passes(ids)[0] if self.recorded is None else self.recorded(ids)[0].clone()

    def _passes(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        """Gradients of the loss on ids [batch, length] in the place of those before; returns the loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part in ids.chunk(self.recovery.accumulate):
            with self.autocast():
                loss = self.distance(part) / self.recovery.accumulate
            loss.backward()
            total += loss.detach()
        return (total,)

    def first(self) -> None:
        """One pass that changes nothing: compiles, and finds out whether a step fits."""
        op_error = (torch.cuda.OutOfMemoryError, ValueError)
        compiled = self.recovery.compiles()
        self.compile(compiled)
        try:
            try:
                self.gradients(0)
            except op_error:
                raise
            except Exception as error:
                if not compiled:
                    raise
                text = (
                    f"{OP}: blocks could not be compiled ({type(error).__name__}: {str(error)[:300]}); going on without"
                )
                warnings.warn(text, RecoveryWarning, stacklevel=2)
                self.compile(False)
                self.gradients(0)
        except torch.cuda.OutOfMemoryError as error:
            got = f"batch={self.recovery.batch}, length={self.recovery.length}"
            fix = "Lower batch or length, or raise accumulate."
            raise ValueError(message(OP, "a step must fit into the device's memory", got, fix)) from error
        # Why: launching the kernels of a step from Python takes longer than running them. The graph owns the gradients.
        self.recorded = record(self._passes, self.batches(0))

    @torch.enable_grad()  # Why: the blocks are compiled with gradients; without, they would be compiled once more.
    def validate(self) -> float:
        """Mean divergence on the held-out windows, in nats a token."""
        try:
            return self._measure()
        except torch.cuda.OutOfMemoryError:
            if self.recorded is None:
                raise
            # Why: the graph keeps the memory of a step for itself.
            self.recorded = None
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            return self._measure()

    def _measure(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        rows = max(1, self.recovery.batch // self.recovery.accumulate)
        for part in self.held_out.split(rows):
            with self.autocast():
                total += self.distance(part).detach().double() * part.shape[0]
        return float(total) / self.held_out.shape[0]

    @one_sequence_a_row()
    def train(self, store: RecoveryState) -> dict[str, Any]:
        """Train until the schedule ends; the model is left in its best state. Returns the report."""
        try:
            self.first()
            parameters = self.trained.all()
            state = store.load(parameters, self.optimizer)
            if state is None:
                value = self.validate()
                state = State(0, 0.0, self._budget(), value, value, -1, [])
                state.keep(parameters)
            self._loop(state, store, parameters)
        finally:
            self.recorded = None
            self.compile(False)
        with torch.no_grad():
            for parameter, best in zip(parameters, state.best, strict=True):
                parameter.copy_(best)
            for parameter in self.trained.groups["other"]:
                parameter.copy_(parameter.to(self.recovery.dtype))
            # Why again: compiled code may leave out roundings to 16 bits, and norms have just been rounded.
            final = self._measure()
        return {
            "steps": state.step,
            "tokens": state.step * self.recovery.batch * self.recovery.length,
            "held_out_windows": int(self.held_out.shape[0]),
            "divergence_before": state.first,
            "divergence": final,
            "best_step": max(state.best_step, 0),
            "learning_rate": self.recovery.rate_for(state.first),
            "seconds": round(time.monotonic() - self.started, 1),
            "training_seconds": round(state.seconds, 1),
            "history": state.history,
        }

    def _budget(self) -> float:
        """Seconds left for training."""
        if self.recovery.minutes is None:
            return math.inf
        return max(self.recovery.minutes * 60 - (time.monotonic() - self.started), 1.0)

    def _share(self, step: int, seconds: float, budget: float) -> float:
        if self.recovery.steps is not None:
            return step / self.recovery.steps
        return seconds / budget

    def _loop(self, state: State, store: RecoveryState, parameters: list[nn.Parameter]) -> None:
        recovery, began, losses = self.recovery, time.monotonic() - state.seconds, []
        saved, sync_every = state.seconds, SYNC_EVERY if self.device.type == "cuda" else 1
        share = self._share(state.step, state.seconds, state.budget)
        validated, highest = int(share * recovery.validations), recovery.rate_for(state.first)
        while share < 1.0:
            rate = highest * min(1.0, (share + 1e-3) / max(recovery.warmup, 1e-3))
            rate *= 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            losses.append(self.gradients(state.step + 1))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            state.step += 1
            if state.step % sync_every == 0 or recovery.steps == state.step:
                loss = float(torch.stack(losses).mean())
                fix = "Lower the learning rate."
                require(math.isfinite(loss), OP, f"the loss must be finite at step {state.step}", repr(loss), fix)
                losses = []
                state.seconds = time.monotonic() - began
                self._tell(state, share, loss)
            share = self._share(state.step, state.seconds, state.budget)
            if int(share * recovery.validations) > validated or share >= 1.0:
                validated = int(share * recovery.validations)
                self._validated(state, parameters)
            if state.seconds - saved > 60 * recovery.checkpoint_minutes:
                saved = state.seconds
                store.save(state, parameters, self.optimizer)
        store.save(state, parameters, self.optimizer)

    def _validated(self, state: State, parameters: list[nn.Parameter]) -> None:
        value = self.validate()
        state.history.append([state.step, round(value, 5)])
        if value < state.lowest:
            state.lowest, state.best_step = value, state.step
            state.keep(parameters)

    def _tell(self, state: State, share: float, loss: float) -> None:
        if self.recovery.progress is not None:
            seconds = time.monotonic() - self.started
            held_out = state.history[-1][1] if state.history else state.first
            self.recovery.progress(RecoveryEvent("train", share, seconds, state.step, loss, held_out))
