"""Compress one decoder block: calibrate its linear layers and solve them.

Owns what a layer is solved against: the second moments of its inputs, and where the recipe asks to correct, the target
that makes up for what the inputs already lost. Knows nothing of the model around the block.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from marlin.compress.blocks import (
    BlockRunner,
    Call,
    DensePass,
    InputSums,
    adds_to_output,
    linear_layers,
    run_until,
    shared_inputs,
)
from marlin.compress.hessian import Factor, factor, output_error
from marlin.compress.low_rank import corrected
from marlin.compress.recipe import METHODS, LayerRecipe
from marlin.compress.refine import refine
from marlin.compress.replicas import Replicas
from marlin.compress.report import LayerReport
from marlin.compress.solvers import Solution, activation_order, solve
from marlin.compress.store import BlockResult
from marlin.errors import require
from marlin.formats import LowRank

WITHOUT_DATA = {"w4a16_sp24": "magnitude", "sp24": "magnitude", "w4a16_dense": "rtn"}


# Of the inputs' extent. Why: second moments of fewer tokens say nothing of most directions.
FEW_TOKENS_SHARE = 0.25
WITH_FEW = {"w4a16_sp24": "wanda", "sp24": "wanda", "w4a16_dense": "rtn"}


# Of second moments that are held at the same time. Why: the inputs of all experts of a large block take 50 GB.
SUMS_BYTES = 8 * 2**30


class CalibrationWarning(UserWarning):
    """A layer was compressed by another method than asked for, or not at all: no calibration tokens, or few."""


@dataclass(frozen=True)
class BlockMaterial:
    """What a block is calibrated with. hidden: its inputs, from the compressed blocks before it; calls: the other
    arguments; dense: what this block does in the dense model (None: nothing is corrected)."""

    replicas: Replicas
    hidden: list[torch.Tensor]
    calls: list[Call]
    dense: DensePass | None = None

    @property
    def run(self) -> BlockRunner:
        """On the device that solves."""
        return self.replicas.runs[0]


@dataclass
class _Moments:
    """Of one shared input. hessian: mean of x x^T. routed: some of the block's tokens went elsewhere. drift: mean of
    (dense x - x) x^T, [K, K], or None. lack: mean of what the block's output lacks times x^T, [N, K], of the one layer
    that adds to it, or None."""

    hessian: torch.Tensor | None = None
    tokens: int = 0
    routed: bool = False
    drift: torch.Tensor | None = None
    lack: torch.Tensor | None = None

    def ordered(self, recipe: LayerRecipe, group_size: int) -> torch.Tensor:
        """The Hessian with its columns in the order that the recipe sweeps them."""
        assert self.hessian is not None
        if recipe.order == "natural":
            return self.hessian
        order = activation_order(self.hessian, group_size)
        return self.hessian[order][:, order]


def _collect(material: BlockMaterial, names: Iterable[str], tail: str | None = None) -> InputSums:
    """Sums over the calibration batches for the layers of these names, on the device that solves."""
    wanted, device = list(names), material.run.device

    def share(run: BlockRunner, batches: list[int]) -> InputSums:
        sums, layers = InputSums(tail=tail), linear_layers(run.block)
        with sums.collect({name: layers[name] for name in wanted}):
            for index in batches:
                if material.dense is not None:
                    sums.refer(material.dense.inputs[index])
                out = run_until(run, material.hidden[index], material.calls[index])
                if tail is not None and material.dense is not None and out is not None:
                    sums.add_lack(material.dense.outputs[index] - out)
        return sums

    first, *others = material.replicas.spread(share, len(material.hidden))
    for other in others:
        first.merge(other, device)
    return first


def _stages(groups: list[list[str]], sequential: bool) -> list[list[list[str]]]:
    """Groups of layers that are calibrated together: all, or one after another; equal layers of experts together."""
    if not sequential:
        return [groups]
    stages: dict[str, list[list[str]]] = {}
    for members in groups:
        stages.setdefault(re.sub(r"\d+", "#", members[0]), []).append(members)
    return list(stages.values())


def _portions(stage: list[list[str]], layers: dict[str, nn.Linear], matrices: int) -> Iterator[list[list[str]]]:
    """Groups whose sums, so many [K, K] each, are held at the same time: a group, or as many as SUMS_BYTES takes."""
    portion: list[list[str]] = []
    held = 0
    for members in stage:
        size = 4 * matrices * layers[members[0]].in_features ** 2
        if portion and held + size > SUMS_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(members)
        held += size
    if portion:
        yield portion


def _sums(material: BlockMaterial, portion: list[list[str]], treated: set[str], tail: str | None) -> InputSums:
    """Sums over the inputs of these groups; empty where none of their layers is treated."""
    watched = [members[0] for members in portion if treated.intersection(members)]
    others = [name for name in watched if name != tail]
    sums = _collect(material, others) if others else InputSums()
    if tail is None or tail not in watched:
        return sums
    found = _collect(material, [tail], tail)
    return InputSums(sums.sums | found.sums, sums.cross | found.cross, tail, found.lack)


def _moments(sums: InputSums, lead: str, name: str, total: int) -> _Moments:
    """total: tokens that came to the block."""
    if lead not in sums.sums:
        return _Moments()
    hessian, tokens = sums.sums[lead].mean(name), sums.sums[lead].tokens
    drift = sums.cross[lead] / tokens - hessian if lead in sums.cross else None
    lack = sums.lack / tokens if sums.lack is not None and sums.tail == lead else None
    return _Moments(hessian, tokens, tokens < total, drift, lack)


def compress_block(
    material: BlockMaterial, names: dict[str, str], plan: Mapping[str, LayerRecipe], sequential: bool
) -> BlockResult:
    """Calibrate one block and solve its layers; under `sequential` the block is left with the solved weights.

    names: layer name inside the block -> full module name, the plan's key.
    """
    layers = linear_layers(material.run.block)
    result = BlockResult({}, {}, [])
    treated = {name for name in layers if plan[names[name]].kind != "skip"}
    total = sum(hidden.shape[0] * hidden.shape[1] for hidden in material.hidden)
    groups, unreached = shared_inputs(material.run, layers, material.hidden, material.calls) if treated else ([], [])
    tail = _tail(material, layers, groups) if material.dense is not None else None
    for stage in _stages(groups, sequential):
        for portion in _portions(stage, layers, 1 if material.dense is None else 2):
            sums = _sums(material, portion, treated, tail)
            for members in portion:
                _solve_group(members, layers, names, plan, _moments(sums, members[0], names[members[0]], total), result)
        if sequential:
            solved = {name: layers[name] for members in stage for name in members}
            write_back(solved, names, result)
            material.replicas.follow(solved)
    for name in layers if not treated else unreached:
        _solve_group([name], layers, names, plan, _Moments(), result)
    order = {name: position for position, name in enumerate(names.values())}
    result.report.sort(key=lambda row: order[row.name])
    return result


def _solve_group(
    members: list[str],
    layers: dict[str, nn.Linear],
    names: dict[str, str],
    plan: Mapping[str, LayerRecipe],
    moments: _Moments,
    result: BlockResult,
) -> None:
    """Solve layers with the same input."""
    by_recipe: dict[LayerRecipe, list[str]] = {}
    for name in members:
        by_recipe.setdefault(plan[names[name]], []).append(name)
    factors: dict[tuple[float, str, int], Factor] = {}
    for recipe, same in by_recipe.items():
        _solve_stacked({names[name]: layers[name] for name in same}, recipe, moments, factors, result)


def _tail(material: BlockMaterial, layers: dict[str, nn.Linear], groups: list[list[str]]) -> str | None:
    """The last layer called, if it stands alone and its output is added to the block's."""
    if not groups or len(groups[-1]) != 1:
        return None
    name = groups[-1][0]
    adds = adds_to_output(material.run, layers[name], material.hidden[0], material.calls[0])
    return name if adds else None


def _target(weight: torch.Tensor, share: float, moments: _Moments, damping: float, name: str) -> torch.Tensor:
    """The weight whose outputs, on the inputs as they are, come nearest to the dense model's: [N, K] fp32.

    From E[(W x_dense - V x) x^T] = 0: V = W + W E[(x_dense - x) x^T] H^-1; for a layer that adds to the block's output,
    the first term is what that output lacks.
    """
    wanted = moments.lack if moments.lack is not None else None
    if wanted is None and moments.drift is not None:
        wanted = weight @ moments.drift
    if share == 0 or wanted is None or moments.hessian is None:
        return weight
    upper = factor(moments.hessian, damping, name).upper
    return weight + share * (wanted @ upper.T) @ upper


def _with_the_data(recipe: LayerRecipe, moments: _Moments, k: int) -> tuple[LayerRecipe, str]:
    """The recipe, or another where too few tokens came to an expert, and why; k: extent of its inputs."""
    if not recipe.needs_hessian or recipe.kind == "skip":
        return recipe, ""
    if moments.hessian is None:
        reached, other = "no calibration token", WITHOUT_DATA[recipe.kind]
    elif moments.routed and moments.tokens < FEW_TOKENS_SHARE * k and recipe.method != WITH_FEW[recipe.kind]:
        reached, other = f"only {moments.tokens} calibration tokens", WITH_FEW[recipe.kind]
    else:
        return recipe, ""
    return recipe.with_method(other), f"{reached} reached it; method {other} instead of {recipe.method}"


def _solve_stacked(
    layers: dict[str, nn.Linear],
    recipe: LayerRecipe,
    moments: _Moments,
    factors: dict[tuple[float, str, int], Factor],
    result: BlockResult,
) -> None:
    """Solve layers with the same inputs and the same recipe at once, and add them to result."""
    started = time.perf_counter()
    hessian, tokens = moments.hessian, moments.tokens
    if recipe.kind == "skip":
        for name, layer in layers.items():
            n, k = layer.out_features, layer.in_features
            result.report.append(LayerReport(name, "skip", "none", n, k, -1, None, None, tokens, 0.0))
        return
    notes = []
    first = next(iter(layers))
    recipe, why = _with_the_data(recipe, moments, layers[first].in_features)
    if why:
        notes.append(why)
        warnings.warn(f"compress {first}: {why}", CalibrationWarning, stacklevel=2)
    weight = torch.cat([layer.weight.detach().float() for layer in layers.values()])
    require(bool(weight.isfinite().all()), f"compress {first}", "weights must be finite", "NaN or infinity")
    group_size, note = recipe.group_size_for(first, weight.shape[0], weight.shape[1])
    notes += [note] if note else []
    weight = _target(weight, recipe.correct, moments, recipe.damping, first)
    used: Factor | None = None
    if recipe.method in ("sparsegpt", "sparsegpt_rtn", "gptq"):
        key = (recipe.damping, recipe.order, group_size)
        if key not in factors:
            factors[key] = factor(moments.ordered(recipe, group_size), recipe.damping, first)
        used = factors[key]
        if used.damping != recipe.damping:
            notes.append(f"damping {used.damping:g} instead of {recipe.damping:g}: Hessian not positive definite")
    solution = solve(weight, recipe, group_size, hessian, used)
    if recipe.refine:
        assert hessian is not None
        solution = refine(solution, weight, hessian, recipe.damping, recipe.refine)
    parts: list[LowRank] = []
    if recipe.low_rank:
        rows = [layer.out_features for layer in layers.values()]
        solution, parts = corrected(solution, weight, hessian, rows, recipe)
    seconds = time.perf_counter() - started
    _keep(layers, weight, solution, parts, recipe, hessian, result)
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
    parts: Sequence[LowRank],
    recipe: LayerRecipe,
    hessian: torch.Tensor | None,
    result: BlockResult,
) -> None:
    """Cut a stacked solution into its layers: canonical weights with their corrections, or floats, and report rows."""
    start = 0
    for index, (name, layer) in enumerate(layers.items()):
        stop = start + layer.out_features
        part = solution.rows(start, stop)
        dense, rank = part.dense, 0
        if parts:
            low = result.low_rank[name] = LowRank(parts[index].up.cpu(), parts[index].down.cpu())
            dense, rank = dense + parts[index].to_dense(), low.rank
        error = None if hessian is None else output_error(weight[start:stop], dense, hessian)
        canonical = part.weight()
        if canonical is None:
            result.floats[name] = part.dense
        else:
            result.weights[name] = canonical
        n, k = layer.out_features, layer.in_features
        assert recipe.method is not None and recipe.method in METHODS[recipe.kind]
        row = LayerReport(name, recipe.kind, recipe.method, n, k, part.group_size, error, None, 0, 0.0, low_rank=rank)
        result.report.append(row)
        start = stop


def write_back(layers: Mapping[str, nn.Linear], names: Mapping[str, str], result: BlockResult) -> None:
    """Give layers the values that were found for them."""
    for name, layer in layers.items():
        full = names[name]
        if full in result.weights:
            dense = result.weights[full].to_dense(torch.float32)
            if full in result.low_rank:
                dense = dense + result.low_rank[full].to_dense()
            layer.weight.data.copy_(dense)
        elif full in result.floats:
            layer.weight.data.copy_(result.floats[full])
