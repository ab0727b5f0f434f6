"""Compress a causal language model block by block.

Owns the order of work: each block is calibrated with what the already compressed blocks before it produce, its linear
layers are solved, the fake-quantized weights are written back, and its outputs feed the next block. One block is on the
device at a time; hidden states wait on the CPU, or on the device where there is ample room. Knows nothing of packed
layouts and kernels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import nn

from marlin.compress import graphs
from marlin.compress.block import BlockMaterial, CalibrationWarning, compress_block
from marlin.compress.blocks import Call, DensePass, capture_calls, decoder_blocks, linear_layers, run_recorded
from marlin.compress.options import Options
from marlin.compress.recipe import LayerRecipe, Recipe
from marlin.compress.reconstruct import Pairs, Schedule, held_out, put_result, reconstruct
from marlin.compress.replicas import Replicas, owner
from marlin.compress.report import Compressed, Event
from marlin.compress.store import BlockResult, Store, fingerprint
from marlin.errors import message, require
from marlin.formats.weight import SCALE_DTYPES

OP = "compress_model"
MAX_WAITING_SHARE = 0.05


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

    Raises: ValueError (a shape or dtype that is not taken, a rule that names no layer, nothing left to compress).
    """
    prefix, blocks = decoder_blocks(model)
    layers = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in linear_layers(block).items()
    }
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names += [name for name, tensor in model.named_parameters() if tensor.ndim == 3]  # fused experts
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
            got = f"{name} in {layers[name].weight.dtype}"
            fix = "Load the model in 16 bits, not quantized."
            require(layers[name].weight.dtype in SCALE_DTYPES, OP, "weights must have 16 or 32 bits", got, fix)
            layer.group_size_for(name, layers[name].out_features, layers[name].in_features)
    require(any(layer.kind != "skip" for layer in plan.values()), OP, "the recipe must compress a layer", "only 'skip'")
    _warn_of_fused(model, recipe)
    return plan


def _warn_of_fused(model: nn.Module, recipe: Recipe) -> None:
    """Say that experts in one tensor stay as they are, unless the recipe says so."""
    for name, tensor in model.named_parameters():
        if tensor.ndim == 3 and name.endswith(".gate_up_proj") and recipe.layer(name).kind != "skip":
            fix = "marlin.compress and the command split those that they can (marlin.experts.split)."
            text = message(OP, "experts must be linear layers to be compressed", f"{name}, one tensor for all", fix)
            warnings.warn(text, CalibrationWarning, stacklevel=3)


class Keeper(Protocol):
    """Where the blocks of a model are kept while they are not worked on: for models that memory does not hold."""

    def identity(self) -> str:
        """What tells this model from others."""

    def open(self, name: str, block: nn.Module) -> None:
        """Give the block of this name its values, on the CPU."""

    def close(self, name: str, block: nn.Module, result: BlockResult) -> None:
        """Take the block's result and its other values away."""


@torch.no_grad()
def compress_model(
    model: nn.Module,
    calibration: torch.Tensor,
    recipe: Recipe,
    *,
    options: Options | None = None,
    keeper: Keeper | None = None,
) -> Compressed:
    """Compress the linear layers of model's decoder blocks; the model is left with the fake-quantized weights.

    calibration: int64 token ids [samples, tokens] (`calibration_windows`); all positions count. keeper: has the blocks'
    values, which are on the meta device before and after; it gets the results, and only the report is returned.
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
    if options.sequential is None:
        options = replace(options, sequential=any(layer.correct > 0 for layer in plan.values()))
    store = None
    if options.resume_dir is not None:
        numeric = _numeric(options, autocast)
        identity = None if keeper is None else keeper.identity()
        store = Store(options.resume_dir, fingerprint(model, calibration, recipe.to_json(), numeric, identity))
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(options.seed)
            walk = _Walk(model, plan, options, autocast, store, keeper, started)
            result = walk.run(calibration)
    finally:
        graphs.release()
        model.train(was_training)
    result.seconds = time.perf_counter() - started
    return result


def _numeric(options: Options, autocast: torch.dtype | None) -> dict[str, Any]:
    """Options that the result depends on."""
    devices = ",".join(str(device) for device in options.devices)
    numeric: dict[str, Any] = {"autocast": str(autocast), "batch": options.batch, "device": devices}
    numeric |= {"seed": options.seed, "sequential": options.sequential}
    if options.reconstruct:
        numeric |= {"reconstruct": options.reconstruct, "reconstruct_rate": options.reconstruct_rate}
    return numeric


def _put_waiting(hidden: list[torch.Tensor], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Hidden states where they wait for their block: on the device of their share where they take little of its free
    memory, else on the CPU."""
    homes = [devices[owner(index, len(hidden), len(devices))] for index in range(len(hidden))]
    for device in set(homes):
        share = sum(h.numel() * h.element_size() for h, home in zip(hidden, homes, strict=True) if home == device)
        if device.type != "cuda" or share >= MAX_WAITING_SHARE * torch.cuda.mem_get_info(device)[0]:
            return [h.to("cpu") for h in hidden]
    return [h.to(home) for h, home in zip(hidden, homes, strict=True)]


@dataclass
class _Walk:
    """One run through a model's blocks."""

    model: nn.Module
    plan: dict[str, LayerRecipe]
    options: Options
    autocast: torch.dtype | None
    store: Store | None
    keeper: Keeper | None
    started: float

    def run(self, calibration: torch.Tensor) -> Compressed:
        """Compress block by block."""
        prefix, blocks = decoder_blocks(self.model)
        captured = capture_calls(self.model, blocks, calibration, self.options.batch)
        if self.options.reconstruct:
            held_out(len(captured.hidden))
        hidden = _put_waiting(captured.hidden, self.options.devices)
        # Why a second stream: correcting and training compare with what the dense model computes for the same tokens.
        compares = self.options.reconstruct > 0 or any(recipe.correct > 0 for recipe in self.plan.values())
        dense = list(hidden) if compares else None
        self._tell(Event("capture", 0, len(blocks), 0.0))
        compressed = Compressed({}, [])
        for index, block in enumerate(blocks):
            place = _Place(index, len(blocks), f"{prefix}.{index}", captured.calls[index])
            if self.keeper is not None:
                self.keeper.open(place.name, block)
            stage, result, hidden, dense = self._block(place, block, hidden, dense)
            if self.keeper is not None:
                self.keeper.close(place.name, block, result)
            else:
                compressed.weights.update(result.weights)
                compressed.low_rank.update(result.low_rank)
            compressed.report.extend(result.report)
            compressed.blocks.extend([] if result.trained is None else [result.trained])
            self._tell(Event(stage, index + 1, len(blocks), 0.0, tuple(result.report), result.trained))
        return compressed

    def _block(
        self, place: _Place, block: nn.Module, hidden: list[torch.Tensor], dense: list[torch.Tensor] | None
    ) -> tuple[str, BlockResult, list[torch.Tensor], list[torch.Tensor] | None]:
        """(stage, result, inputs of the next block, the same in the dense model) of one block, left with its result."""
        home = next(block.parameters()).device
        replicas = Replicas(block, self.options.devices, self.autocast)
        result = self.store.load(place.index) if self.store is not None else None
        corrects = any(self.plan[f"{place.name}.{layer}"].correct > 0 for layer in linear_layers(block))
        passed = None if dense is None else _dense_pass(replicas, dense, place.calls, corrects and result is None)
        stage = "block" if result is None else "resumed"
        if result is None:
            material = BlockMaterial(replicas, hidden, place.calls, passed if corrects else None)
            result = self._solve(place, material, None if passed is None else passed.outputs)
            if self.store is not None:
                self.store.save(place.index, result)
        put_result(block, place.name, result)
        if place.index + 1 < place.total:
            replicas.follow()
            hidden = replicas.each(lambda run, index: run(hidden[index], place.calls[index]), len(hidden))
            dense = None if passed is None else passed.outputs
        block.to(home)
        return stage, result, hidden, dense

    def _solve(self, place: _Place, material: BlockMaterial, wanted: list[torch.Tensor] | None) -> BlockResult:
        """Solve the layers of a block and train it. wanted: its outputs in the dense model."""
        names = {layer: f"{place.name}.{layer}" for layer in linear_layers(material.run.block)}
        result = compress_block(material, names, self.plan, bool(self.options.sequential))
        if not self.options.reconstruct or wanted is None:
            return result

        def tell(step: int, error: float) -> None:
            self._tell(Event("reconstruct", place.index, place.total, 0.0, step=step, error=error))

        put_result(material.run.block, place.name, result)
        if material.dense is not None:
            material.dense.inputs.clear()  # Why: training needs the memory.
        options = self.options
        schedule = Schedule(options.reconstruct, options.reconstruct_rate, options.seed + place.index, tell)
        pairs = Pairs(material.hidden, place.calls, wanted)
        return reconstruct(material.run, place.name, result, pairs, schedule)

    def _tell(self, event: Event) -> None:
        if self.options.progress is not None:
            self.options.progress(replace(event, seconds=time.perf_counter() - self.started))


@dataclass(frozen=True)
class _Place:
    """Of a block in the model. calls: by batch."""

    index: int
    total: int
    name: str
    calls: list[Call]


def _dense_pass(replicas: Replicas, hidden: list[torch.Tensor], calls: list[Call], keep_inputs: bool) -> DensePass:
    """What the dense block makes of all batches; its linear layers' inputs only where they are kept."""
    found = replicas.each(lambda run, index: run_recorded(run, hidden[index], calls[index], keep_inputs), len(hidden))
    return DensePass([out for out, _ in found], [inputs for _, inputs in found])
