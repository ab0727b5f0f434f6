"""Block-wise reconstruction: train a compressed block so that its outputs come near to those of the dense model.

Owns the training of one block: floating-point latents of the codes, scales, norms and biases; the loss; and which state
is kept. The block is given what the compressed blocks before it produce, its target is what the dense model computes at
that place, so it also makes up for what came before. No labels; the masks stay. What comes out are canonical weights,
and they are kept only if the block that has them is nearer to the target on windows held out of the training. Knows
nothing of the model around the block.

Loss: squared distance over the square of the target, each token by itself. Why not over all: a few tokens have outputs
many times as large as the others, and the next block normalizes each token anyway.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from marlin.compress.block import write_back
from marlin.compress.blocks import BlockRunner, Call, linear_layers, to_device
from marlin.compress.latent import LatentLinear, put_latents
from marlin.compress.report import BlockReport
from marlin.compress.store import BlockResult
from marlin.errors import message, require

OP = "reconstruct"
HELD_OUT_SHARE = 1 / 8
VALIDATIONS = 8
WARMUP = 0.05
# Why its own: the logarithm of a scale and a norm's weight move all that they multiply.
OTHER_RATE = 0.2
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Schedule:
    """steps: of the optimizer. rate: of the latents, in units of their scales. seed: of the order of the batches.
    tell: called with (step, held-out error)."""

    steps: int
    rate: float
    seed: int
    tell: Callable[[int, float], None] = lambda step, error: None


@dataclass(frozen=True)
class Pairs:
    """Inputs of a block, the other arguments of its calls, and the outputs wanted; one entry per batch."""

    hidden: list[torch.Tensor]
    calls: list[Call]
    wanted: list[torch.Tensor]


def held_out(count: int) -> list[int]:
    """Which of so many batches are not trained on: the last eighth, at least one.

    Raises: ValueError (fewer than two batches).
    """
    fix = "Use more calibration windows, or a smaller batch."
    require(count >= 2, OP, "there must be two batches of calibration windows", f"{count}", fix)
    return list(range(count - max(1, round(count * HELD_OUT_SHARE)), count))


def token_errors(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared distance over the square of what is wanted, of each token: [b, T, d] twice, fp32 [b, T]."""
    away = (out.float() - wanted.float()).square().sum(-1)
    return away / wanted.float().square().sum(-1).clamp(min=SMALLEST_NORM)


def _floating(value: Any) -> Any:
    """Tensors of 16 bits as float32, inside tuples, lists and dicts too."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_floating(each) for each in value)
    if isinstance(value, list):
        return [_floating(each) for each in value]
    return {key: _floating(each) for key, each in value.items()} if isinstance(value, dict) else value


def block_error(run: BlockRunner, pairs: Pairs, batches: list[int]) -> float:
    """Mean token error of the block as it stands."""
    found = [token_errors(run(pairs.hidden[i], pairs.calls[i]), pairs.wanted[i].to(pairs.hidden[i])) for i in batches]
    return float(torch.cat([each.flatten().double().cpu() for each in found]).mean())


@dataclass
class _Trainee:
    """A float32 copy of a block with latents in the place of compressed layers. rates: its trained parameters, each
    with its learning rate in units of the schedule's."""

    run: BlockRunner
    block: nn.Module
    rates: dict[str, tuple[nn.Parameter, float]]

    @classmethod
    def of(cls, run: BlockRunner, prefix: str, result: BlockResult) -> _Trainee:
        """Of the block that has this result. prefix: its name in the model."""
        cut = len(prefix) + 1
        weights = {name[cut:]: weight for name, weight in result.weights.items()}
        layers = linear_layers(run.block)
        # Why: the latents take the place of these; a copy would only cost memory.
        block = copy.deepcopy(run.block, {id(layers[name].weight): layers[name].weight for name in weights})
        put_latents(block, weights, True, None, {name[cut:]: low for name, low in result.low_rank.items()})
        block.requires_grad_(False).float()
        rates: dict[str, tuple[nn.Parameter, float]] = {}
        for name, parameter in block.named_parameters():
            leaf = name.rpartition(".")[2]
            if parameter.ndim == 1 or leaf in ("latent", "log_scale"):
                parameter.requires_grad_(True)
                rates[name] = parameter, 1.0 if leaf == "latent" else OTHER_RATE
        return cls(run, block, rates)

    @property
    def autocast(self) -> torch.dtype | None:
        """Of the products: the run's own, or bfloat16 on a GPU for a model of 16 bits."""
        own = next(self.run.block.parameters()).dtype
        if self.run.autocast is None and self.run.device.type == "cuda" and own != torch.float32:
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        return self.run.autocast

    def error(self, pairs: Pairs, index: int) -> torch.Tensor:
        """Mean token error of a batch."""
        device, call, dtype = self.run.device, pairs.calls[index], self.autocast
        args, kwargs = _floating(to_device(call.args, device)), _floating(to_device(call.kwargs, device))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            out = self.block(pairs.hidden[index].to(device).float(), *args, **kwargs)
        return token_errors(out[0] if isinstance(out, tuple) else out, pairs.wanted[index].to(device)).mean()

    def result(self, result: BlockResult, prefix: str) -> BlockResult:
        """What has been trained, in the form that is stored: norms and biases as 16 bits hold them."""
        weights, others = dict(result.weights), dict(result.others)
        for name, layer in self.block.named_modules():
            if isinstance(layer, LatentLinear):
                weights[f"{prefix}.{name}"] = layer.weight()
        for name, before in self.run.block.named_parameters():
            found = self.rates.get(name)
            if found is not None and not torch.equal(found[0].detach(), before.float()):
                stored = torch.float16 if before.dtype == torch.float32 else before.dtype
                others[f"{prefix}.{name}"] = found[0].detach().to(stored).to(before.dtype).cpu()
        return replace(result, weights=weights, others=others)


@dataclass
class _Best:
    """The state of least error. step: 0 before the first. unreached: layers that no token came to."""

    error: float
    values: list[torch.Tensor]
    step: int = 0
    unreached: int = 0


def _mean_error(trainee: _Trainee, pairs: Pairs, batches: list[int]) -> float:
    with torch.no_grad():
        return float(torch.stack([trainee.error(pairs, index) for index in batches]).mean())


def _order(count: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all once, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator).tolist() for _ in range(-(-steps // count))]
    return [index for each in rounds for index in each][:steps]


def _rate(share: float) -> float:
    """Of the highest learning rate, after a share of the steps."""
    return min(1.0, share / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * share))


def _train(trainee: _Trainee, name: str, pairs: Pairs, outside: list[int], schedule: Schedule) -> _Best:
    """Train; the block is left in its best state, which is returned."""
    parameters = [parameter for parameter, _ in trainee.rates.values()]
    factors = sorted({factor for _, factor in trainee.rates.values()})
    groups: list[dict[str, Any]] = [
        {"params": [each for each, factor in trainee.rates.values() if factor == own], "factor": own} for own in factors
    ]
    fused = trainee.run.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None)
    best = _Best(_mean_error(trainee, pairs, outside), [each.detach().clone() for each in parameters])
    every = max(1, schedule.steps // VALIDATIONS)
    for step, index in enumerate(_order(len(pairs.hidden) - len(outside), schedule.steps, schedule.seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * group["factor"] * _rate((step - 0.5) / schedule.steps)
        with torch.enable_grad():
            trainee.error(pairs, index).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == schedule.steps:
            error = _mean_error(trainee, pairs, outside)
            fix = "Lower reconstruct_rate."
            require(math.isfinite(error), f"{OP} {name}", f"the error must be finite at step {step}", f"{error}", fix)
            schedule.tell(step, error)
            if error < best.error:
                best.error, best.step = error, step
                for kept, parameter in zip(best.values, parameters, strict=True):
                    kept.copy_(parameter.detach())
    latents = [layer.latent for layer in trainee.block.modules() if isinstance(layer, LatentLinear)]
    best.unreached = sum(latent not in optimizer.state for latent in latents)
    for kept, parameter in zip(best.values, parameters, strict=True):
        parameter.data.copy_(kept)
    return best


def put_result(block: nn.Module, prefix: str, result: BlockResult) -> None:
    """Give a block the values that were found for it."""
    layers = linear_layers(block)
    write_back(layers, {name: f"{prefix}.{name}" for name in layers}, result)
    parameters = dict(block.named_parameters())
    for name, value in result.others.items():
        parameters[name[len(prefix) + 1 :]].data.copy_(value)


def reconstruct(run: BlockRunner, prefix: str, result: BlockResult, pairs: Pairs, schedule: Schedule) -> BlockResult:
    """Train a block's packed layers, norms and biases; returns the result with them, or as it was where it is nearer.

    prefix: the block's name in the model; the block has the values of result, and is left with those returned. Low-rank
    corrections and layers that are not packed stay as they are.
    Raises: ValueError (too few windows, memory, an error that is not finite).
    """
    if not result.weights:
        return result
    started, op = time.perf_counter(), f"{OP} {prefix}"
    outside = held_out(len(pairs.hidden))
    before = block_error(run, pairs, outside)
    plain = {name: tensor.detach().clone() for name, tensor in run.block.named_parameters() if tensor.ndim == 1}
    original = replace(result, others={f"{prefix}.{name}": tensor for name, tensor in plain.items()})
    try:
        trainee = _Trainee.of(run, prefix, result)
        best = _train(trainee, prefix, pairs, outside, schedule)
        found = trainee.result(result, prefix)
    except torch.cuda.OutOfMemoryError as error:
        got = " x ".join(str(size) for size in pairs.hidden[0].shape[:2]) + " tokens"
        fix = "Lower the batch, or the tokens of a window."
        raise ValueError(message(op, "a step must fit into the device's memory", got, fix)) from error
    del trainee
    put_result(run.block, prefix, found)
    after, step = block_error(run, pairs, outside), best.step
    if not after < before:
        put_result(run.block, prefix, original)
        found, after, step = result, before, 0
    note = f"no token reached {best.unreached} layers, which stay as they were solved" if best.unreached else ""
    seconds = time.perf_counter() - started
    return replace(found, trained=BlockReport(prefix, before, after, schedule.steps, step, seconds, note))
