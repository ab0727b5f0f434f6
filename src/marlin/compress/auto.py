"""A mixed recipe for a budget: measured sensitivity, then the least costly layers 2:4 INT4 and the others INT4.

Owns the order of the steps and what is known of the result before it is made. The measuring and the choice belong to
`marlin.compress.sensitivity`. Knows nothing of files and consoles.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from marlin.compress.blocks import module_device
from marlin.compress.options import Options
from marlin.compress.recipe import LayerRecipe, Recipe
from marlin.compress.report import LayerReport
from marlin.compress.sensitivity import Unit, choose, for_bits, measure
from marlin.compress.walk import compress_model, plan_layers
from marlin.errors import require

OP = "auto"
FIRST_PASS = "all-2of4"


@dataclass(frozen=True)
class Plan:
    """recipe: what to compress with. units: least costly first. layers: how many of each kind. bits_per_weight: of the
    decoder's linear layers; stored_bytes: of the whole model with 16 bits for all else. perplexity_ratio: estimated, to
    the dense model's, on the probe text; None where bits were given."""

    recipe: Recipe
    units: tuple[Unit, ...]
    layers: dict[str, int]
    bits_per_weight: float
    stored_bytes: int
    perplexity_ratio: float | None = None


def plan(
    model: Any,
    calibration: torch.Tensor,
    probe: torch.Tensor,
    *,
    bits: float | None = None,
    max_ppl_increase: float | None = None,
    group_size: int = 128,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The mixed recipe for at most `bits` stored bits a weight, or for a perplexity at most (1 + max_ppl_increase)
    times the dense model's (one of the two).

    model: dense, unchanged afterwards; compressed once in a copy, all layers to 2:4, and measured on the first device
    as a whole. calibration: int64 [S, T]. probe: int64 [B, T] of other text, one batch. progress(done, total): blocks
    measured. options: of the copy's run, whose finished blocks are kept below options.resume_dir.
    Raises: ValueError (neither or both budgets, one that cannot be kept; see also `compress_model`).
    """
    given = (bits is None) != (max_ppl_increase is None)
    require(given, OP, "one of bits and max_ppl_increase must be given", f"bits={bits}, {max_ppl_increase=}")
    options = options or Options()
    # Why not trained: each unit is measured in the dense model, whose norms are not those of a trained block.
    first = replace(options, reconstruct=0)
    if options.resume_dir is not None:
        first = replace(first, resume_dir=Path(options.resume_dir) / FIRST_PASS)
    everything = Recipe(default=LayerRecipe(group_size=group_size))
    weights = compress_model(copy.deepcopy(model), calibration, everything, options=first).weights
    home = module_device(model)
    model.to(options.first_device)
    dense, ratio = LayerRecipe(kind="w4a16_dense", group_size=group_size), None
    units = measure(model, weights, probe, options=options, progress=progress)
    if bits is not None:
        recipe = for_bits(units, weights, bits, dense)
    else:
        assert max_ppl_increase is not None
        choice = choose(
            model, weights, probe, max_ratio=1 + max_ppl_increase, units=units, dense=dense, options=options
        )
        recipe, ratio = choice.recipe, choice.perplexity / choice.dense_perplexity
    model.to(home)
    return _described(model, recipe, tuple(units), ratio)


def _described(model: Any, recipe: Recipe, units: tuple[Unit, ...], ratio: float | None) -> Plan:
    """What is known of the result."""
    total = packed = 0.0
    kinds: Counter[str] = Counter()
    for name, layer in plan_layers(model, recipe).items():
        n, k = model.get_submodule(name).weight.shape
        size = -1 if layer.kind == "skip" else layer.group_size_for(name, n, k)[0]
        row = LayerReport(name, layer.kind, "", n, k, size, None, None, 0, 0.0)
        kinds[layer.kind] += 1
        total, packed = total + n * k, packed + row.bits_per_weight * n * k
    others = sum(parameter.numel() for parameter in model.parameters()) - total
    return Plan(recipe, units, dict(kinds), packed / total, int(packed / 8 + 2 * others), ratio)
