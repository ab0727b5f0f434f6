"""Which layers stand 2:4 pruning: measured one by one in the dense model, then chosen for a mixed recipe.

Owns the measurement (divergence from the dense model's predictions when one unit alone is 2:4 INT4) and the choice (the
largest set of least sensitive units whose measured perplexity stays under a bound, the rest dense INT4). A unit is
the layers of one block that share a parent module, e.g. its attention; all experts of a block are one. Layer errors are
not used: a small error in one place costs more perplexity than a large one in another.

It measures on text that was not used for calibration, with the weights that an all-2:4 run has already found; no
layer is solved again. The recipe that comes out is then run by `compress_model` like any other.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from marlin.compress.blocks import BlockRunner, Captured, capture_calls, decoder_blocks, linear_layers, module_device
from marlin.compress.options import Options
from marlin.compress.recipe import LayerRecipe, Recipe
from marlin.compress.solvers import round_to_nearest
from marlin.errors import require
from marlin.formats import Weight

OP = "sensitivity.choose"


@dataclass(frozen=True)
class Unit:
    """Layers that go together. divergence: mean KL(dense || model with only this unit 2:4) in nats a token."""

    name: str
    layers: tuple[str, ...]
    num_weights: int
    divergence: float

    @property
    def cost(self) -> float:
        """Divergence a weight: the order in which units are made 2:4."""
        return self.divergence / self.num_weights


@dataclass(frozen=True)
class Choice:
    """units: least costly first, of which the first `num_sparse` are 2:4. perplexity: of the model put together from
    the weights at hand, on the text given; dense_perplexity: of the dense model on the same."""

    recipe: Recipe
    units: tuple[Unit, ...]
    num_sparse: int
    perplexity: float
    dense_perplexity: float

    def to_json(self) -> str:
        """The measurements and the choice as JSON."""
        body = {
            "num_sparse": self.num_sparse,
            "perplexity": self.perplexity,
            "dense_perplexity": self.dense_perplexity,
            "units": [asdict(unit) for unit in self.units],
            "recipe": json.loads(self.recipe.to_json()),
        }
        return json.dumps(body, indent=2)


class _Probe:
    """The dense model cut into blocks, with what each is called with and the hidden states before it."""

    def __init__(self, model: nn.Module, token_ids: torch.Tensor, autocast: torch.dtype | None, keep: int) -> None:
        self.model, self.token_ids, self.keep = model, token_ids, keep
        self.prefix, self.blocks = decoder_blocks(model)
        self.autocast = autocast
        self.captured: Captured = capture_calls(model, self.blocks, token_ids, token_ids.shape[0])
        device = module_device(model)
        self.runners = [BlockRunner(block, device, autocast) for block in self.blocks]

    def run(self, hidden: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Hidden states after the last block, from those before block `first`."""
        for index in range(first, len(self.blocks)):
            hidden = self.runners[index](hidden, self.captured.calls[index][0])
        return hidden

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at every `keep`-th position for hidden states after the last block: [B, T', V] fp32."""

        def replay(*args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        def thin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, :: self.keep], *args[1:])

        # Why: blocks are replaced by the states at hand, so that norm and head run as the model itself runs them.
        hooks = []
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is not None:
            hooks.append(head.register_forward_pre_hook(thin))
        for block in self.blocks:
            block.forward = replay
        enabled = self.autocast is not None
        device = module_device(self.model)
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype=self.autocast, enabled=enabled):
                logits = self.model(input_ids=self.token_ids.to(device), use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward
            for hook in hooks:
                hook.remove()
        step = 1 if head is not None else self.keep
        return logits[:, ::step].float().log_softmax(-1)


@contextlib.contextmanager
def _substituted(layers: Mapping[str, nn.Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, the named layers have these dense weights; afterwards their own."""
    own = {name: layers[name].weight.data for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight.data = weight.to(own[name])
        yield
    finally:
        for name, tensor in own.items():
            layers[name].weight.data = tensor


def _without_number(parent: str) -> str:
    """Of an expert, the name of all of them."""
    return re.sub(r"\.experts\.\d+$", ".experts", parent)


def _units(prefix: str, blocks: nn.ModuleList, weights: Mapping[str, Weight]) -> list[list[tuple[str, ...]]]:
    """Layer names of the units of each block, those with a 2:4 weight. All experts of a block are one unit."""
    found = []
    for index, block in enumerate(blocks):
        parents: dict[str, list[str]] = {}
        for name in linear_layers(block):
            full = f"{prefix}.{index}.{name}"
            if full in weights and weights[full].kind == "w4a16_sp24":
                parents.setdefault(_without_number(name.rpartition(".")[0]), []).append(full)
        found.append([tuple(names) for names in parents.values()])
    return found


def measure(
    model: nn.Module,
    weights: Mapping[str, Weight],
    token_ids: torch.Tensor,
    *,
    keep: int = 2,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Unit]:
    """Divergence of each unit, least costly a weight first.

    model: the dense model, unchanged afterwards. weights: of an all-2:4 run, by module name. token_ids: int64 [B, T],
    one batch, not used for calibration. keep: every keep-th position counts. progress(done, total): after each block.
    """
    probe = _Probe(model, token_ids, (options or Options()).autocast_dtype(model), keep)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hidden = [probe.captured.hidden[0]]
    for runner, calls in zip(probe.runners, probe.captured.calls, strict=True):
        hidden.append(runner(hidden[-1], calls[0]))
    dense = probe.log_probs(hidden[-1])
    found = []
    for index, names_of_units in enumerate(_units(probe.prefix, probe.blocks, weights)):
        for names in names_of_units:
            with _substituted(layers, {name: weights[name].to_dense(torch.float32) for name in names}):
                other = probe.log_probs(probe.run(hidden[index], index))
            divergence = float((dense.exp() * (dense - other)).sum(-1).mean())
            num_weights = sum(layers[name].weight.numel() for name in names)
            label = _without_number(names[0].rpartition(".")[0]) if len(names) > 1 else names[0]
            found.append(Unit(label, names, num_weights, max(divergence, 0.0)))
        if progress is not None:
            progress(index + 1, len(probe.blocks))
    return sorted(found, key=lambda unit: (unit.cost, unit.name))


def _perplexity(probe: _Probe) -> float:
    """Perplexity on the probe's text, all kept positions whose next token is known."""
    log_probs = probe.log_probs(probe.run(probe.captured.hidden[0]))
    ids = probe.token_ids.to(log_probs.device)
    targets = ids[:, 1 :: probe.keep]
    picked = log_probs[:, : targets.shape[1]].gather(-1, targets.unsqueeze(-1))
    return math.exp(min(-float(picked.double().mean()), 700.0))


def choose(
    model: nn.Module,
    weights: Mapping[str, Weight],
    token_ids: torch.Tensor,
    *,
    max_ratio: float = 1.9,
    units: list[Unit] | None = None,
    dense: LayerRecipe | None = None,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """A mixed recipe whose perplexity stays at most max_ratio times the dense model's.

    model, weights, token_ids, progress: as for `measure`. units: its result, measured here when None. dense: recipe of
    the other layers, by default dense INT4 with the group size of the 2:4 ones; here they are only rounded, so what is
    chosen is a little better than measured.
    The number of 2:4 units is found by bisection, each step a measured perplexity of the model put together.
    Raises: ValueError (no 2:4 weights, or all layers in dense INT4 already exceed the bound).
    """
    prefix, blocks = decoder_blocks(model)
    found = any(_units(prefix, blocks, weights))
    require(found, OP, "weights must hold 2:4 layers of this model", f"{len(weights)} others")
    require(max_ratio > 1, OP, "max_ratio must be above 1", f"max_ratio={max_ratio}")
    if units is None:
        units = measure(model, weights, token_ids, options=options, progress=progress)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sparse_size = next(w.group_size for w in weights.values() if w.kind == "w4a16_sp24")
    dense = dense or LayerRecipe(kind="w4a16_dense", group_size=sparse_size)
    probe = _Probe(model, token_ids, (options or Options()).autocast_dtype(model), 1)
    reference = _perplexity(probe)
    rounded = {}
    for name in (name for unit in units for name in unit.layers):
        weight = layers[name].weight.data.float()
        size, _ = dense.group_size_for(name, *weight.shape)
        rounded[name] = round_to_nearest(weight, None, size, dense.search_steps).dense

    def measured(count: int) -> float:
        sparse = {name for unit in units[:count] for name in unit.layers}
        chosen = {name: weights[name].to_dense(torch.float32) if name in sparse else rounded[name] for name in rounded}
        with _substituted(layers, chosen):
            return _perplexity(probe)

    low, high = 0, len(units)
    best = measured(0)
    require(
        best <= max_ratio * reference,
        OP,
        f"dense INT4 alone must stay within {max_ratio} times the dense perplexity {reference:.2f}",
        f"{best:.2f}",
        "Raise max_ratio or use a smaller group_size.",
    )
    while low < high:
        middle = (low + high + 1) // 2
        value = measured(middle)
        if value <= max_ratio * reference:
            low, best = middle, value
        else:
            high = middle - 1
    return Choice(mixed_recipe(units[:low], weights, dense), tuple(units), low, best, reference)


def for_bits(units: list[Unit], weights: Mapping[str, Weight], bits: float, dense: LayerRecipe) -> Recipe:
    """The mixed recipe of at most `bits` stored bits a weight that makes the least costly units 2:4.

    units: of `measure`, least costly a weight first. weights: by module name, of an all-2:4 run. dense: recipe of the
    other layers.
    Raises: ValueError (all units together need more bits).
    """
    bits_of = {"w4a16_sp24": 3.0, "w4a16_dense": 4.0}

    def stored(kind: str, group_size: int, k: int) -> float:
        return bits_of[kind] + 16 / (group_size if group_size > 0 else k)

    total = sum(weights[name].n * weights[name].k for unit in units for name in unit.layers)
    count, used = 0, 0.0
    costs = []
    for unit in units:
        sparse = full = 0.0
        for name in unit.layers:
            w = weights[name]
            size, _ = dense.group_size_for(name, w.n, w.k)
            sparse += stored("w4a16_sp24", w.group_size, w.k) * w.n * w.k
            full += stored("w4a16_dense", size, w.k) * w.n * w.k
        costs.append((sparse, full))
    used = sum(full for _, full in costs)
    while used > bits * total and count < len(units):
        used += costs[count][0] - costs[count][1]
        count += 1
    least = sum(sparse for sparse, _ in costs) / max(total, 1)
    fix = "Raise the bits, or use a larger group size."
    require(used <= bits * total * (1 + 1e-9), "for_bits", f"bits must be at least {least:.3f}", f"{bits}", fix)
    return mixed_recipe(units[:count], weights, dense)


def mixed_recipe(sparse: list[Unit], weights: Mapping[str, Weight], dense: LayerRecipe) -> Recipe:
    """The recipe that makes these units 2:4 INT4, with their group sizes, and all other layers `dense`."""
    rules = [
        (name, LayerRecipe(kind="w4a16_sp24", group_size=weights[name].group_size))
        for unit in sorted(sparse, key=lambda unit: unit.name)
        for name in unit.layers
    ]
    return Recipe(tuple(rules), default=dense)
