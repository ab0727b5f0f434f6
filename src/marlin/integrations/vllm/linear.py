"""The linear method: parameters of a layer before loading, packed weights after it, and the product.

Owns the life of a layer within vLLM. Parts of a merged layer (q, k, v; gate, up) that have one kind and group size
become one product; others are computed one by one and joined. Low-rank corrections of all parts become one, two thin
products beside the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm import envs
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from marlin import ops
from marlin.errors import require
from marlin.formats.checkpoint import LayerSpec
from marlin.formats.layouts import TILE_N, PackedWeight
from marlin.formats.low_rank import LowRank
from marlin.formats.weight import K_MULTIPLE, N_MULTIPLE
from marlin.integrations.vllm.leaves import DOWN, PLAIN, UP, Part, correction, packed_part
from marlin.integrations.vllm.parameters import PartsParameter, all_places, new_parameter

try:
    from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant
except ImportError:  # where older versions have it
    from vllm.model_executor.layers.batch_invariant import linear_batch_invariant


class Product(NamedTuple):
    """One product of a layer: rows n of the output, from the parameters of these names."""

    kind: str
    n: int
    group_size: int
    codes: str
    meta: str | None
    scales: str | None


@register_weight_loader_v2_supported_method
class SparseMarlinLinearMethod(LinearMethodBase):
    """One linear layer of vLLM with packed weights. specs: of its checkpoint layers, None where not quantized.

    A single spec for a layer of several parts is a layer that is merged in the checkpoint. LayerSpec.kind may be the
    name of a published format.
    """

    def __init__(self, name: str, specs: Sequence[LayerSpec | None]) -> None:
        self._op = f"layer {name}"
        self._specs = tuple(specs)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a parameter for every tensor of the layer. Raises: ValueError (extents, tensor-parallel cuts)."""
        specs = self._specs if len(self._specs) > 1 else self._specs * len(output_partition_sizes)
        need = "a merged layer must have as many checkpoint layers as parts"
        require(len(specs) == len(output_partition_sizes), self._op, need, f"{len(specs)} for {output_partition_sizes}")
        along_n, along_k = output_size != sum(output_partition_sizes), input_size != input_size_per_partition
        parts = []
        for spec, n in zip(specs, output_partition_sizes, strict=True):
            part = _part(self._op, spec, n, input_size_per_partition, input_size)
            part.check_cut(self._op, along_n, along_k)
            parts.append(part)
        separate = len(self._specs) == len(output_partition_sizes)
        full = [(spec.n, spec.k) if separate and spec and spec.n else None for spec in specs]
        loader = extra_weight_attrs["weight_loader"]
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            loader = _WholeLoader(layer)
        for name, places in all_places(self._op, parts, full).items():
            layer.register_parameter(name, new_parameter(places, params_dtype, loader))
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.logical_widths = output_partition_sizes
        layer.params_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the loaded values and leave packed tensors alone. Raises: CheckpointError, ValueError."""
        loaded = {
            name: tensor for name, tensor in layer.named_parameters(recurse=False) if isinstance(tensor, PartsParameter)
        }
        if not loaded:
            return
        parts = next(iter(loaded.values())).places.parts
        tensors = [_part_tensors(loaded, index) for index in range(len(parts))]
        weights = [self._part_weight(part, own, layer) for part, own in zip(parts, tensors, strict=True)]
        corrections = [correction(self._op, own) for own in tensors]
        for name in loaded:
            delattr(layer, name)
        layer.products = tuple(_register(layer, index, run) for index, run in enumerate(_runs(weights)))
        is_shared = len(self._specs) < len(parts)
        layer.low_rank = _register_low_rank(layer, [part.n for part in parts], corrections, is_shared)

    def _part_weight(self, part: Part, tensors: Mapping[str, Tensor], layer: Any) -> PackedWeight | Tensor:
        return tensors[PLAIN] if part.kind == PLAIN else packed_part(self._op, part, tensors, layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N] of this rank."""
        out = self._products(layer, x, bias)
        if not layer.low_rank:
            return out
        return out + _unquantized(_unquantized(x, layer.low_rank_down), layer.low_rank_up)

    def _products(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(layer.products) == 1:
            return _product(layer, layer.products[0], x, bias)
        outputs, start = [], 0
        for product in layer.products:
            own_bias = None if bias is None else bias[start : start + product.n]
            outputs.append(_product(layer, product, x, own_bias))
            start += product.n
        return torch.cat(outputs, dim=-1)


class _WholeLoader:
    """Loads layers that vLLM keeps whole on every rank, and the output head, of which a rank holds rows."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, param: PartsParameter, loaded_weight: Tensor, shard_id: int | None = None) -> None:
        rows = getattr(self._layer, "shard_indices", None)
        if rows is None:
            param.load_part(shard_id or 0, loaded_weight)
            return
        first, end = rows.org_vocab_start_index, rows.org_vocab_end_index
        if end > first:
            param.load_part(0, loaded_weight, (first, 0), end - first)


def _part(op: str, spec: LayerSpec | None, n: int, k: int, full_k: int) -> Part:
    if spec is None:
        return Part(PLAIN, n, k, -1, 1)
    for name, extent, multiple in (("output size", n, N_MULTIPLE), ("input size", k, K_MULTIPLE)):
        need = f"the {name} of a rank must be a multiple of {multiple}"
        require(extent % multiple == 0, op, need, str(extent), "Use another tensor-parallel size.")
    if spec.k:
        need = f"the input size must be that of config.json, {spec.k}"
        require(spec.k == full_k, op, need, str(full_k), "config.json was altered: copy or download it again.")
    groups = 1
    if spec.group_size != -1:
        need = f"the input size of a rank must be a multiple of group_size={spec.group_size}"
        require(k % spec.group_size == 0, op, need, str(k), "Use another tensor-parallel size.")
        groups = full_k // spec.group_size
    return Part(spec.kind, n, k, spec.group_size, groups, spec.low_rank)


def _part_tensors(loaded: Mapping[str, PartsParameter], index: int) -> dict[str, Tensor]:
    """The tensors that a part has."""
    return {name: tensor for name, parameter in loaded.items() if (tensor := parameter.part(index)) is not None}


def _joins(left: PackedWeight | Tensor, right: PackedWeight | Tensor) -> bool:
    """Whether the rows of right can follow those of left in one weight."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor)
    return left.kind == right.kind and left.group_size == right.group_size and left.n % TILE_N == 0


def _runs(weights: Sequence[PackedWeight | Tensor]) -> list[list[PackedWeight | Tensor]]:
    """Neighbours that make one weight."""
    runs: list[list[PackedWeight | Tensor]] = []
    for weight in weights:
        if runs and _joins(runs[-1][-1], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return runs


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    # Why clone: a part is a view of the parameter that held all of them.
    return tensors[0].clone() if len(tensors) == 1 else torch.cat(list(tensors))


def _register(layer: nn.Module, index: int, run: Sequence[PackedWeight | Tensor]) -> Product:
    """Give the layer the tensors of one product."""
    suffix = f"_{index}" if index else ""

    def keep(name: str, tensors: Sequence[Tensor]) -> str:
        layer.register_parameter(name + suffix, nn.Parameter(_joined(tensors), requires_grad=False))
        return name + suffix

    plain = [weight for weight in run if isinstance(weight, Tensor)]
    if plain:
        name = keep(PLAIN, plain)
        return Product(PLAIN, sum(weight.shape[0] for weight in plain), -1, name, None, None)
    packed = [weight for weight in run if isinstance(weight, PackedWeight)]
    metas = [weight.meta for weight in packed if weight.meta is not None]
    # Why qweight: vLLM looks for this name where it needs the device of a quantized layer.
    codes = keep("qweight", [weight.codes for weight in packed])
    meta = keep("meta", metas) if metas else None
    scales = keep("scales", [weight.scales for weight in packed])
    return Product(packed[0].kind, sum(weight.n for weight in packed), packed[0].group_size, codes, meta, scales)


def _register_low_rank(
    layer: nn.Module, rows: Sequence[int], corrections: Sequence[LowRank | None], is_shared: bool
) -> int:
    """Give the layer one correction for all its parts; returns its rank, 0 without one.

    down is that of all parts, one below the other; up has each part's own in its rows and columns, zeros elsewhere.
    rows: of each part. is_shared: whether the parts have one down, being merged in the checkpoint.
    """
    present = [low for low in corrections if low is not None]
    if not present:
        return 0
    down = present[0].down.clone() if is_shared else torch.cat([low.down for low in present])
    up = down.new_zeros(sum(rows), down.shape[0])
    column = 0
    for block, low in zip(up.split(list(rows)), corrections, strict=True):
        if low is not None:
            block[:, column : column + low.rank] = low.up
            column += 0 if is_shared else low.rank
    for name, tensor in ((UP, up), (DOWN, down)):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return int(down.shape[0])


def _unquantized(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if envs.VLLM_BATCH_INVARIANT and x.is_cuda:
        return linear_batch_invariant(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(layer: nn.Module, product: Product, x: Tensor, bias: Tensor | None) -> Tensor:
    codes = getattr(layer, product.codes)
    if product.scales is None:
        return _unquantized(x, codes, bias)
    meta = None if product.meta is None else getattr(layer, product.meta)
    operands = (codes, meta, getattr(layer, product.scales), bias)
    return ops.packed_linear(product.kind, x, operands, product.n, product.group_size)
