"""Compress a causal language model block by block.

Owns the order of work: each block is calibrated with what the already compressed blocks before it produce, its linear
layers are solved, the fake-quantized weights are written back, and its outputs feed the next block. One block is on the
device at a time; hidden states wait on the CPU, or on the device where there is ample room. Knows nothing of packed
layouts and kernels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from marlin.compress import graphs
from marlin.compress.block import BlockMaterial, compress_block, write_back
from marlin.compress.blocks import BlockRunner, Call, capture_calls, decoder_blocks, dense_pass, linear_layers
from marlin.compress.recipe import LayerRecipe, Recipe
from marlin.compress.report import Compressed, Event, LayerReport, Progress
from marlin.compress.store import BlockResult, Store, fingerprint
from marlin.errors import message, require

OP = "compress_model"
MAX_WAITING_SHARE = 0.05


@dataclass(frozen=True)
class Options:
    """How a compression runs; what it does is the recipe's matter.

    device: where blocks and Hessians live while they are worked on.
    seed: seeds torch's generator, for models whose blocks draw random numbers.
    batch: calibration rows in one forward pass of a block.
    sequential: layers of a block are solved in the order of their calls, each calibrated with what the compressed
    ones before it in the same block produce; one more pass through the block for each input that layers share. None:
    where the recipe corrects.
    autocast: dtype of the forward passes' matrix products: "auto" (bfloat16 for float32 models where the device has
    it), "bfloat16", or "none".
    resume_dir: where finished blocks are kept, and taken from; None keeps nothing.
    progress: called with an `Event` after the capture and after each block.
    """

    device: str | torch.device = "cpu"
    seed: int = 0
    batch: int = 4
    sequential: bool | None = None
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
        numeric = {"autocast": str(autocast), "batch": options.batch, "device": str(options.device)}
        numeric |= {"seed": options.seed, "sequential": options.sequential}
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


def _waiting_place(device: torch.device, hidden: list[torch.Tensor]) -> torch.device:
    """Where hidden states wait for their block: on the device where they take little of its free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(h.numel() * h.element_size() for h in hidden) < MAX_WAITING_SHARE * free:
            return device
    return torch.device("cpu")


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
        place = _waiting_place(torch.device(self.options.device), captured.hidden)
        hidden = [h.to(place) for h in captured.hidden]
        # Why a second stream: correcting compares with what the dense model computes for the same tokens.
        dense = list(hidden) if any(recipe.correct > 0 for recipe in self.plan.values()) else None
        self._tell("capture", 0, len(blocks), [])
        compressed = Compressed({}, [])
        for index, block in enumerate(blocks):
            name, last = f"{prefix}.{index}", index + 1 == len(blocks)
            if self.keeper is not None:
                self.keeper.open(name, block)
            stage, result, hidden, dense = self._block(index, name, block, captured.calls[index], hidden, dense, last)
            if self.keeper is not None:
                self.keeper.close(name, block, result)
            else:
                compressed.weights.update(result.weights)
                compressed.low_rank.update(result.low_rank)
            compressed.report.extend(result.report)
            self._tell(stage, index + 1, len(blocks), result.report)
        return compressed

    def _block(
        self,
        index: int,
        name: str,
        block: nn.Module,
        calls: list[Call],
        hidden: list[torch.Tensor],
        dense: list[torch.Tensor] | None,
        last: bool,
    ) -> tuple[str, BlockResult, list[torch.Tensor], list[torch.Tensor] | None]:
        """(stage, result, inputs of the next block, the same in the dense model) of one block, left with its result."""
        device, home = torch.device(self.options.device), next(block.parameters()).device
        block.to(device)
        run = BlockRunner(block, device, self.autocast)
        names = {layer: f"{name}.{layer}" for layer in linear_layers(block)}
        result = self.store.load(index) if self.store is not None else None
        corrects = any(self.plan[layer].correct > 0 for layer in names.values())
        passed = None if dense is None else dense_pass(run, dense, calls, corrects and result is None)
        stage = "block" if result is None else "resumed"
        if result is None:
            material = BlockMaterial(run, hidden, calls, passed if corrects else None)
            result = compress_block(material, names, self.plan, bool(self.options.sequential))
            if self.store is not None:
                self.store.save(index, result)
        write_back(linear_layers(block), names, result)
        if not last:
            hidden = [run(h, call) for h, call in zip(hidden, calls, strict=True)]
            dense = None if passed is None else passed.outputs
        block.to(home)
        return stage, result, hidden, dense

    def _tell(self, stage: str, done: int, total: int, layers: list[LayerReport]) -> None:
        if self.options.progress is not None:
            seconds = time.perf_counter() - self.started
            self.options.progress(Event(stage, done, total, seconds, tuple(layers)))
