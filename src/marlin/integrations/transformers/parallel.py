"""Tensor parallelism in transformers: styles that cut packed tensors, under which its own communication runs.

Owns where a `SparseLinear` is cut (tiles along N for a column-parallel layer, along K for a row-parallel one) and that
a plan uses these styles for packed layers. What ranks send each other belongs to transformers. Needs its DTensor-based
parallelism (`transformers.distributed.tensor_parallel`); with versions that lack it, a parallel load is refused.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional

from marlin import ops
from marlin.errors import UnsupportedError, message, require
from marlin.experts import Experts
from marlin.formats.layouts import TILE_K, TILE_N
from marlin.nn import SparseLinear, sparse_linears

_OP = "tp_plan"
_PREFIX = "sparse_marlin_"
# Styles of transformers for linear layers, by the dimension of the tiles that they cut: 0 along N, 1 along K.
_CUTS = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "colwise_rep": 0,
    "rowwise": 1,
    "rowwise_split_input": 1,
    "rowwise_rep": 1,
}
# Dimension of each tensor that is cut, for cuts along N and along K; None: every rank has all of it.
_DIMS: dict[str, tuple[int | None, int | None]] = {
    "codes": (0, 1),
    "meta": (0, 1),
    "scales": (0, 1),
    "low_rank_up": (0, None),
    "low_rank_down": (None, 1),
}


def _api() -> Any:
    """transformers' styles, or None where there are none that cut DTensors."""
    try:
        from transformers.distributed import tensor_parallel
    except ImportError:
        return None
    return tensor_parallel if hasattr(tensor_parallel, "apply_tensor_parallelism") else None


@functools.cache
def register_styles() -> tuple[str, ...]:
    """Enter `sparse_marlin_colwise` and so on beside transformers' styles; returns the names of theirs."""
    api = _api()
    if api is None:
        return ()
    known = tuple(name for name in _CUTS if name in api.ALL_PARALLEL_STYLES)
    for name in known:
        theirs = api.ALL_PARALLEL_STYLES[name]
        api.ALL_PARALLEL_STYLES.register(_PREFIX + name, _style(type(theirs), theirs, _CUTS[name]))
    return known


def _style(base: type, theirs: Any, dim: int) -> Any:
    class Style(base):
        """transformers' style, for packed layers too."""

        def install_forward(self, module: torch_nn.Module, mesh: Any) -> Any:
            if isinstance(module, SparseLinear):
                shard(module, mesh, dim)
            return super().install_forward(module, mesh)

    return Style(input_layouts=theirs.input_layouts, output_layouts=theirs.output_layouts)


def update_plan(model: Any) -> None:
    """Use our styles where the model's plan, changed in place, names packed layers."""
    plan = getattr(model, "tp_plan", None)
    if not plan or not register_styles():
        return
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    packed = {replace_layer_number_by_wildcard(name) for name, _ in sparse_linears(model)}
    whole = {
        replace_layer_number_by_wildcard(name) for name, module in model.named_modules() if isinstance(module, Experts)
    }
    for name in [name for name in plan if any(f"{name}.".startswith(f"{each}.") for each in whole)]:
        del plan[name]  # Why: their style shares out fused tensors; every rank has all of the split ones.
    plan.update({name: _PREFIX + style for name, style in plan.items() if name in packed and style in _CUTS})


def shard(layer: SparseLinear, mesh: Any, dim: int) -> None:
    """Make the layer's tensors, on the meta device, parameters of which each rank loads its tiles along `dim`.

    Raises: ValueError (extents that ranks cannot share in whole tiles and groups).
    """
    ranks, n, k = mesh.size(), layer.out_features, layer.in_features
    whole_row = layer.group_size == -1
    step = TILE_N if dim == 0 else max(TILE_K, 1 if whole_row else layer.group_size)
    name, extent = ("rows", n) if dim == 0 else ("columns", k)
    need = f"{ranks} ranks must each get whole {name} of {step}"
    fix = "Use another number of ranks, or leave the layer out of the plan."
    require(extent % (step * ranks) == 0, _OP, need, f"a layer [{n}, {k}]", fix)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for leaf, dims in _DIMS.items():
        tensor = layer._buffers.pop(leaf)
        if tensor is None:
            layer.register_parameter(leaf, None)
            continue
        cut = dims[dim]
        # Why: with one scale per row, every rank that has a part of the columns needs all scales.
        placement = Replicate() if cut is None or (leaf == "scales" and dim == 1 and whole_row) else Shard(cut)
        placed = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
        layer.register_parameter(leaf, torch_nn.Parameter(placed, requires_grad=False))
    # transformers then hands local tensors to forward, and adds the bias of a row-parallel layer after the sum.
    layer._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
    layer.forward = functools.partial(_local_forward, layer)  # type: ignore[method-assign]


def _local_forward(layer: SparseLinear, act: Tensor) -> Tensor:
    """act [..., K of the rank] to [..., N of the rank]."""
    tensors: dict[str, Any] = layer._parameters
    operands = (tensors["codes"], tensors["meta"], tensors["scales"], tensors["bias"])
    out = ops.packed_linear(layer.kind, act, operands, TILE_N * operands[0].shape[0], layer.group_size)
    if tensors["low_rank_down"] is None:
        return out
    inner = functional.linear(act, tensors["low_rank_down"].to(act.dtype))
    return out + functional.linear(inner, tensors["low_rank_up"].to(act.dtype))


def local(tensor: Any) -> Any:
    """What this rank has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(layer: SparseLinear) -> bool:
    """Whether each rank has a part of the layer."""
    return "codes" in layer._parameters


def check_loaded(model: Any) -> None:
    """Refuse a parallel load whose plan leaves a packed layer whole but splits its input or output.

    Raises: UnsupportedError.
    """
    if (getattr(model, "_tp_size", None) or 1) <= 1:
        return
    if _api() is None:
        import transformers

        need = "compressed layers need the DTensor-based parallelism of transformers"
        fix = "Install transformers 5.17 or newer."
        raise UnsupportedError(message(_OP, need, f"transformers {transformers.__version__}", fix))
    for name, layer in sparse_linears(model):
        # Why forward: transformers puts its own in the place of that of every module which its plan names.
        if "forward" in vars(layer) and not is_sharded(layer):
            need = f"packed layers must have one of the styles {', '.join(_PREFIX + style for style in _CUTS)}"
            fix = "Name one of them in the plan, or leave the plan to the model."
            raise UnsupportedError(message(_OP, need, f"another style for {name}", fix))


def check_whole(model: Any) -> None:
    """Raises: UnsupportedError (a rank has only a part of a layer)."""
    name = next((name for name, layer in sparse_linears(model) if is_sharded(layer)), None)
    if name is not None:
        need = "layers must be whole to be dequantized"
        raise UnsupportedError(message("dequantize", need, f"{name} on several ranks", "Load it on one rank."))
