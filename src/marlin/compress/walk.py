"""Compress a causal language model block by block.

Owns the order of work: each block is calibrated with what the already compressed blocks before it produce, its linear
layers are solved, the fake-quantized weights are written back, and its outputs feed the next block. Hidden states
wait on the CPU; one block is on the device at a time. Knows nothing of packed layouts and kernels.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin.compress.blocks import BlockRunner, InputSums, capture_calls, decoder_blocks, linear_layers
from marlin.compress.hessian import Factor, factor, output_error
from marlin.compress.recipe import METHODS, LayerRecipe, Recipe
from marlin.compress.report import Compressed, Event, LayerReport, Progress
from marlin.compress.solvers import Solution, solve
from marlin.compress.store import BlockResult, Store, fingerprint
from marlin.errors import message, require

OP = "compress_model"
WITHOUT_DATA = {"w4a16_sp24": "magnitude", "sp24": "magnitude", "w4a16_dense": "rtn"}


class CalibrationWarning(UserWarning):
    """A layer got no calibration tokens and was compressed by a method that needs none."""


@dataclass(frozen=True)
class Options:
    """How a compression runs; what it does is the recipe's matter.

    device: where blocks and Hessians live while they are worked on.
    seed: seeds torch's generator, for models whose blocks draw random numbers.
    batch: calibration rows in one forward pass of a block.
    autocast: dtype of the forward passes' matrix products: "auto" (bfloat16 for float32 models where the device has
    it), "bfloat16", or "none".
    resume_dir: where finished blocks are kept, and taken from; None keeps nothing.
    progress: called with an `Event` after the capture and after each block.
    """

    device: str | torch.device = "cpu"
    seed: int = 0
    batch: int = 4
    autocast: str = "auto"
    resume_dir: str | Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, "Options", "batch must be at least 1", f"batch={self.batch}")
        choices = ("auto", "bfloat16", "none")
        require(self.autocast in choices, "Options", f"autocast must be one of {choices}", repr(self.autocast))

    def autocast_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype that `autocast` stands for with this model on this device."""
        if self.autocast != "auto":
            return torch.bfloat16 if self.autocast == "bfloat16" else None
        if next(model.parameters()).dtype != torch.float32:
            return None
        if torch.device(self.device).type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return torch.bfloat16 if fast is not None and fast() else None


def _check_calibration(calibration: torch.Tensor) -> None:
    if calibration.dtype != torch.int64:
        raise TypeError(message(OP, "calibration must be int64 token ids", str(calibration.dtype)))
    require(
        calibration.ndim == 2 and calibration.numel() > 0,
        OP,
        "calibration must have shape [samples, tokens]",
        str(tuple(calibration.shape)),
        "Build it with marlin.compress.calibration_windows.",
    )


def plan_layers(model: nn.Module, recipe: Recipe) -> dict[str, LayerRecipe]:
    """Recipe of every linear layer inside the decoder blocks, checked before any work: module name -> LayerRecipe.

    Raises: ValueError (a shape that no format takes, a rule that names no layer, nothing left to compress).
    """
    prefix, blocks = decoder_blocks(model)
    layers = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in linear_layers(block).items()
    }
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern, _ in recipe.rules:
        require(
            any(fnmatchcase(name, pattern) for name in names),
            OP,
            "every rule of the recipe must match a linear layer",
            f"pattern {pattern!r}",
            f"Layers have names like {next(iter(layers))!r}.",
        )
    plan = {name: recipe.layer(name) for name in layers}
    for name, layer in plan.items():
        if layer.kind != "skip":
            layer.group_size_for(name, layers[name].out_features, layers[name].in_features)
    require(any(layer.kind != "skip" for layer in plan.values()), OP, "the recipe must compress a layer", "only 'skip'")
    return plan


@torch.no_grad()
def compress_model(
    model: nn.Module, calibration: torch.Tensor, recipe: Recipe, *, options: Options | None = None
) -> Compressed:
    """Compress the linear layers of model's decoder blocks; the model is left with the fake-quantized weights.

    calibration: int64 token ids [samples, tokens] (`calibration_windows`); all positions count.
    Returns canonical weights by module name and a report of every linear layer. Equal inputs on the same machine give
    equal bits, with or without an interruption in between.
    Raises: ValueError (calibration, recipe or layer shapes; NaN or infinite inputs; a Hessian that no damping mends),
    TypeError (dtype of calibration), CheckpointError (resume_dir of another run, or damaged).
    """
    options = options or Options()
    started = time.perf_counter()
    _check_calibration(calibration)
    plan = plan_layers(model, recipe)
    autocast = options.autocast_dtype(model)
    store = None
    if options.resume_dir is not None:
        numeric = {"autocast": str(autocast), "batch": options.batch, "device": str(options.device)}
        numeric["seed"] = options.seed
        store = Store(options.resume_dir, fingerprint(model, calibration, recipe.to_json(), numeric))
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(options.seed)
            result = _walk(model, calibration, plan, options, autocast, store, started)
    finally:
        model.train(was_training)
    result.seconds = time.perf_counter() - started
    return result


def _walk(
    model: nn.Module,
    calibration: torch.Tensor,
    plan: dict[str, LayerRecipe],
    options: Options,
    autocast: torch.dtype | None,
    store: Store | None,
    started: float,
) -> Compressed:
    prefix, blocks = decoder_blocks(model)
    device = torch.device(options.device)

    def tell(stage: str, done: int, layers: list[LayerReport]) -> None:
        if options.progress is not None:
            seconds = time.perf_counter() - started
            options.progress(Event(stage, done, len(blocks), seconds, tuple(layers)))

    captured = capture_calls(model, blocks, calibration, options.batch)
    hidden = [h.cpu() for h in captured.hidden]
    tell("capture", 0, [])
    compressed = Compressed({}, [])
    for index, block in enumerate(blocks):
        calls = captured.calls[index]
        home = next(block.parameters()).device
        block.to(device)
        run = BlockRunner(block, device, autocast)
        names = {name: f"{prefix}.{index}.{name}" for name in linear_layers(block)}
        result = store.load(index) if store is not None else None
        stage = "block" if result is None else "resumed"
        if result is None:
            result = _compress_block(block, run, hidden, calls, names, plan)
            if store is not None:
                store.save(index, result)
        _write_back(block, names, result)
        if index + 1 < len(blocks):
            hidden = [run(h, call) for h, call in zip(hidden, calls, strict=True)]
        block.to(home)
        compressed.weights.update(result.weights)
        compressed.report.extend(result.report)
        tell(stage, index + 1, result.report)
    return compressed


def _compress_block(
    block: nn.Module,
    run: BlockRunner,
    hidden: list[torch.Tensor],
    calls: list[Any],
    names: dict[str, str],
    plan: dict[str, LayerRecipe],
) -> BlockResult:
    """Calibrate one block on hidden and solve its layers; the block itself is not changed."""
    layers = linear_layers(block)
    sums = InputSums()
    if any(plan[names[name]].kind != "skip" for name in layers):
        with sums.collect(layers):
            for h, call in zip(hidden, calls, strict=True):
                run(h, call)
    result = BlockResult({}, {}, [])
    reached = {name for members in sums.members.values() for name in members}
    for members in [*sums.members.values(), *([name] for name in layers if name not in reached)]:
        by_recipe: dict[LayerRecipe, list[str]] = {}
        for name in members:
            by_recipe.setdefault(plan[names[name]], []).append(name)
        hessian = tokens = None
        if any(recipe.kind != "skip" for recipe in by_recipe) and members[0] in sums.sums:
            hessian, tokens = sums.sums[members[0]].mean(names[members[0]]), sums.sums[members[0]].tokens
        factors: dict[float, Factor] = {}
        for recipe, same in by_recipe.items():
            _solve_stacked({names[name]: layers[name] for name in same}, recipe, hessian, tokens or 0, factors, result)
    order = {name: position for position, name in enumerate(names.values())}
    result.report.sort(key=lambda row: order[row.name])
    return result


def _solve_stacked(
    layers: dict[str, nn.Linear],
    recipe: LayerRecipe,
    hessian: torch.Tensor | None,
    tokens: int,
    factors: dict[float, Factor],
    result: BlockResult,
) -> None:
    """Solve layers with the same inputs and the same recipe at once, and add them to result."""
    started = time.perf_counter()
    if recipe.kind == "skip":
        for name, layer in layers.items():
            n, k = layer.out_features, layer.in_features
            result.report.append(LayerReport(name, "skip", "none", n, k, -1, None, None, tokens, 0.0))
        return
    notes = []
    first = next(iter(layers))
    if hessian is None and recipe.needs_hessian:
        fallback = WITHOUT_DATA[recipe.kind]
        notes.append(f"no calibration token reached it; method {fallback} instead of {recipe.method}")
        warnings.warn(f"compress {first}: {notes[-1]}", CalibrationWarning, stacklevel=2)
        recipe = replace(recipe, method=fallback)
    weight = torch.cat([layer.weight.detach().float() for layer in layers.values()])
    require(bool(weight.isfinite().all()), f"compress {first}", "weights must be finite", "NaN or infinity")
    group_size, note = recipe.group_size_for(first, weight.shape[0], weight.shape[1])
    notes += [note] if note else []
    used: Factor | None = None
    if recipe.needs_hessian and recipe.method != "wanda":
        assert hessian is not None
        if recipe.damping not in factors:
            factors[recipe.damping] = factor(hessian, recipe.damping, first)
        used = factors[recipe.damping]
        if used.damping != recipe.damping:
            notes.append(f"damping {used.damping:g} instead of {recipe.damping:g}: Hessian not positive definite")
    solution = solve(weight, recipe, group_size, hessian, used)
    seconds = time.perf_counter() - started
    _keep(layers, weight, solution, recipe, hessian, result)
    for row_index, (name, layer) in enumerate(layers.items(), start=len(result.report) - len(layers)):
        share = seconds * layer.out_features / weight.shape[0]
        result.report[row_index] = replace(
            result.report[row_index],
            name=name,
            damping=used.damping if used is not None else None,
            tokens=tokens,
            seconds=share,
            note="; ".join(notes),
        )


def _keep(
    layers: dict[str, nn.Linear],
    weight: torch.Tensor,
    solution: Solution,
    recipe: LayerRecipe,
    hessian: torch.Tensor | None,
    result: BlockResult,
) -> None:
    """Cut a stacked solution into its layers: canonical weights, or floats, and a report row each."""
    start = 0
    for name, layer in layers.items():
        stop = start + layer.out_features
        part = solution.rows(start, stop)
        error = None if hessian is None else output_error(weight[start:stop], part.dense, hessian)
        canonical = part.weight()
        if canonical is None:
            result.floats[name] = part.dense
        else:
            result.weights[name] = canonical
        n, k = layer.out_features, layer.in_features
        assert recipe.method is not None and recipe.method in METHODS[recipe.kind]
        result.report.append(LayerReport(name, recipe.kind, recipe.method, n, k, part.group_size, error, None, 0, 0.0))
        start = stop


def _write_back(block: nn.Module, names: dict[str, str], result: BlockResult) -> None:
    layers = linear_layers(block)
    for name, full in names.items():
        if full in result.weights:
            layers[name].weight.data.copy_(result.weights[full].to_dense(torch.float32))
        elif full in result.floats:
            layers[name].weight.data.copy_(result.floats[full])
