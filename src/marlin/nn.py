"""`SparseLinear`, the module that holds a packed weight, and putting it in the place of `torch.nn.Linear`.

Owns state only: which tensors a layer has, their names and dtypes, and how a model's layers are exchanged. What the
product is belongs to `marlin.ops`, what the bits mean to `marlin.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from marlin import ops
from marlin.errors import message, require
from marlin.formats import int4
from marlin.formats.layouts import TILE_K, TILE_N, TILE_WORDS, PackedWeight, pack, unpack
from marlin.formats.low_rank import LowRank
from marlin.formats.sparsity import top2_mask
from marlin.formats.weight import K_MULTIPLE, N_MULTIPLE, SCALE_DTYPES, CompressedWeight, DenseInt4Weight, Weight

# Clips tried when from_dense chooses scales. Measured: 80 lower the squared error of rounding by under 1 % more.
_SEARCH_STEPS = 20
_OP = "SparseLinear"


def _check_extents(op: str, out_features: int, in_features: int, group_size: int) -> None:
    for name, value, multiple in (("in_features", in_features, K_MULTIPLE), ("out_features", out_features, N_MULTIPLE)):
        fix = f"Pad to {-(-value // multiple) * multiple} with zeros, or leave this layer dense."
        require(value > 0 and value % multiple == 0, op, f"{name} must be a multiple of {multiple}", str(value), fix)
    int4.num_groups(in_features, group_size, op)


class SparseLinear(nn.Module):
    """`torch.nn.Linear` with an INT4 weight, 2:4-sparse ("w4a16_sp24") or dense ("w4a16_dense").

    Buffers as in `marlin.formats.layouts.PackedWeight`: codes, meta (None when dense), scales; and low_rank_up [N, r]
    and low_rank_down [r, K], whose product is added to the weight (None without one). Parameter: bias or None.
    Weights are frozen; gradients reach the input and the bias. `.to(dtype)` casts scales, corrections and bias, never
    the codes.
    forward: [..., in_features] to [..., out_features], of the dtype of scales (float32 on the CPU only).
    """

    codes: Tensor
    meta: Tensor | None
    scales: Tensor
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: str = "w4a16_sp24",
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        low_rank: int = 0,
    ) -> None:
        """An empty layer (zero scales), to be filled by `load_state_dict`. Raises: ValueError, TypeError."""
        super().__init__()
        require(kind in TILE_WORDS, _OP, f"kind must be one of {tuple(TILE_WORDS)}", repr(kind))
        _check_extents(_OP, out_features, in_features, group_size)
        _check_dtype(dtype)
        self.in_features, self.out_features, self.kind, self.group_size = in_features, out_features, kind, group_size
        tiles = (-(-out_features // TILE_N), -(-in_features // TILE_K))
        code_words, meta_words = TILE_WORDS[kind]
        groups = int4.num_groups(in_features, group_size, _OP)
        self.register_buffer("codes", torch.zeros(*tiles, code_words, dtype=torch.int32, device=device))
        # Why 0x44..: metadata of positions (0, 1), so that an empty layer is legal.
        meta = torch.full((*tiles, meta_words), 0x44444444, dtype=torch.int32, device=device) if meta_words else None
        self.register_buffer("meta", meta)
        self.register_buffer("scales", torch.zeros(tiles[0], groups, TILE_N, dtype=dtype, device=device))
        for name, shape in (("low_rank_up", (out_features, low_rank)), ("low_rank_down", (low_rank, in_features))):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if low_rank else None)
        values = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    def forward(self, act: Tensor) -> Tensor:
        # Why not self.codes and so on: torch.nn.Module finds them in Python, which takes longer than the launch.
        tensors: dict[str, Any] = self._buffers
        operands = (tensors["codes"], tensors["meta"], tensors["scales"], self._parameters["bias"])
        out = ops.packed_linear(self.kind, act, operands, self.out_features, self.group_size)
        down = tensors["low_rank_down"]
        if down is None:
            return out
        up: Tensor = tensors["low_rank_up"]
        return out + nn.functional.linear(nn.functional.linear(act, down.to(act.dtype)), up.to(act.dtype))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"
        text += f", low_rank={self.low_rank.rank}" if self.low_rank is not None else ""
        return f"{text}, group_size={self.group_size}, bias={self.bias is not None}, dtype={self.scales.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        # Why before anything changes: a layer that is half cast would fail far from the cast.
        dtype = fn(self.scales.new_empty(0)).dtype
        if dtype != self.scales.dtype:
            _check_dtype(dtype)
            if not self.scales.is_meta and not bool(fn(self.scales).isfinite().all()):
                got = f"{self.scales.dtype} scales up to {float(self.scales.abs().max()):.4g}"
                raise ValueError(message(_OP, f"scales must be finite in {dtype}", got, "Cast to torch.bfloat16."))
        super()._apply(fn, recurse)
        return self

    @property
    def packed(self) -> PackedWeight:
        """The weight as `PackedWeight`, sharing memory."""
        n, k = self.out_features, self.in_features
        return PackedWeight(self.kind, self.codes, self.meta, self.scales, n, k, self.group_size)

    @property
    def qweight(self) -> Tensor:
        """The codes under the name by which peft finds the device of a quantized layer."""
        return self.codes

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank correction, sharing memory, or None."""
        up, down = self.low_rank_up, self.low_rank_down
        return None if up is None or down is None else LowRank(up, down)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the layer multiplies with, low-rank correction included: [N, K], of the dtype of scales when None."""
        dtype, low = dtype or self.scales.dtype, self.low_rank
        if low is None:
            return self.to_weight().to_dense(dtype)
        return (self.to_weight().to_dense(torch.float32) + low.to_dense()).to(dtype)

    def to_weight(self) -> Weight:
        """The quantized weight in canonical form, a copy, without the low-rank correction.

        Raises: ValueError (illegal metadata, scales not finite).
        """
        return unpack(self.packed)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None = None, low_rank: LowRank | None = None
    ) -> SparseLinear:
        """A layer around packed tensors (shared where contiguous) and copies of bias [N] and low_rank.

        Raises: ValueError, TypeError (shapes, dtypes).
        """
        packed.validate()
        group_size, dtype = packed.group_size, packed.scales.dtype
        layer = cls(packed.k, packed.n, kind=packed.kind, group_size=group_size, dtype=dtype, device="meta")
        layer.codes, layer.scales = packed.codes.contiguous(), packed.scales.contiguous()
        layer.meta = None if packed.meta is None else packed.meta.contiguous()
        if bias is not None:
            require(tuple(bias.shape) == (packed.n,), _OP, f"bias must have shape [{packed.n}]", str(tuple(bias.shape)))
            own_bias = bias.detach().to(device=packed.scales.device, dtype=dtype, copy=True)
            layer.bias = nn.Parameter(own_bias, bias.requires_grad or not isinstance(bias, nn.Parameter))
        if low_rank is not None:
            low_rank.validate(packed.n, packed.k)
            place: dict[str, Any] = {"device": packed.scales.device, "dtype": dtype, "copy": True}
            layer.low_rank_up, layer.low_rank_down = low_rank.up.to(**place), low_rank.down.to(**place)
        return layer

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        low_rank: LowRank | None = None,
    ) -> SparseLinear:
        """A layer of a canonical weight, on its device; dtype is that of scales, bias and low-rank correction (of
        weight.scales when None).

        Raises: ValueError, TypeError (the weight's violated invariant, scales not finite in dtype, bias shape).
        """
        if dtype is not None:
            _check_dtype(dtype)
        return cls.from_packed(pack(weight, dtype), bias, low_rank)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear | Tensor,
        *,
        group_size: int = 128,
        mask: Tensor | None = None,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        exact: bool = False,
        kind: str = "w4a16_sp24",
    ) -> SparseLinear:
        """A layer from a dense one (weight [N, K] and its bias) or from a weight tensor.

        mask: bool [N, K], two of every four along K kept; None keeps the two largest magnitudes.
        scales: [N, K / group_size]; None searches the clip of least squared error over the kept weights.
        exact: demand a weight that already is code * scale, with `scales` given, and take it apart without loss.
        The layer has the weight's device and dtype (that of scales when exact). Rounding alone loses more than
        `marlin.compress` does.
        Raises: ValueError (shapes, group_size, mask, not finite, not exact), TypeError (dtype, kind).
        """
        op = "SparseLinear.from_dense"
        dense = linear.weight if isinstance(linear, nn.Linear) else linear
        dense = dense.detach()
        if bias is None and isinstance(linear, nn.Linear):
            bias = linear.bias
        require(dense.ndim == 2, op, "weight must have 2 dimensions", str(tuple(dense.shape)))
        require(kind in TILE_WORDS, op, f"kind must be one of {tuple(TILE_WORDS)}", repr(kind))
        require(kind == "w4a16_sp24" or mask is None, op, "a dense INT4 weight takes no mask", "a mask")
        _check_dtype(dense.dtype, op)
        n, k = dense.shape
        _check_extents(op, n, k, group_size)
        if not exact:
            return cls.from_weight(_round(op, kind, dense, scales, group_size, mask), bias, dense.dtype)
        if scales is None:
            raise ValueError(message(op, "exact=True needs the scales that the weight was quantized with", "None"))
        if kind == "w4a16_dense":
            return cls.from_weight(DenseInt4Weight.from_dense(dense, scales, group_size), bias)
        return cls.from_weight(CompressedWeight.from_dense(dense, scales, group_size, mask), bias)


def _check_dtype(dtype: torch.dtype, op: str = _OP) -> None:
    if dtype not in SCALE_DTYPES:
        raise TypeError(message(op, "dtype must be float16, bfloat16 or float32", str(dtype)))


def _round(op: str, kind: str, dense: Tensor, scales: Tensor | None, group_size: int, mask: Tensor | None) -> Weight:
    """Magnitude mask, clip search and rounding, wherever the caller did not choose."""
    require(bool(dense.isfinite().all()), op, "weight must be finite", "NaN or infinity", "Check the checkpoint.")
    if kind == "w4a16_sp24" and mask is None:
        mask = top2_mask(dense.abs())
    if scales is None:
        scales = int4.group_scales(dense, group_size, mask, _SEARCH_STEPS)
    expected = (dense.shape[0], int4.num_groups(dense.shape[1], group_size, op))
    require(tuple(scales.shape) == expected, op, f"scales must have shape {expected}", str(tuple(scales.shape)))
    # Why before rounding the weight: codes must be the nearest for the scales that the layer holds.
    scales = scales.to(dense.dtype)
    codes = int4.quantize(dense, torch.where(scales != 0, scales, torch.ones_like(scales)))
    if mask is None:
        return DenseInt4Weight(codes, scales, group_size).validate()
    return CompressedWeight.from_codes(codes, mask, scales, group_size)


def replace_linears(
    model: nn.Module,
    weights: Mapping[str, Weight],
    dtype: torch.dtype | None = None,
    low_rank: Mapping[str, LowRank] | None = None,
) -> None:
    """Put a `SparseLinear` in the place of each named `torch.nn.Linear` of the model, in place; biases are kept.

    weights: by name as in `model.named_modules()`. dtype: of scales and bias (the replaced weight's when None).
    low_rank: corrections of some of them.
    Everything is checked before the first layer changes; a module known under several names is replaced under all.
    Raises: ValueError (no such module, not a Linear, shapes), TypeError (dtype).
    """
    op = "replace_linears"
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in weights.items():
        module = modules.get(name)
        if module is None or not name:
            raise ValueError(message(op, "names must be those of model.named_modules()", repr(name)))
        if not isinstance(module, nn.Linear):
            raise ValueError(message(op, "only torch.nn.Linear can be replaced", f"{name}: {type(module).__name__}"))
        expected = (module.out_features, module.in_features)
        got = f"{name}: weight {(weight.n, weight.k)}"
        require((weight.n, weight.k) == expected, op, f"the weight must have the layer's shape {expected}", got)
        _check_dtype(dtype or module.weight.dtype, op)
        lost = module.bias is not None and module.bias.is_meta
        require(not lost, op, "biases must have values", f"{name}: bias on the meta device", "Load the model first.")
    for name, weight in weights.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        low = (low_rank or {}).get(name)
        layer = SparseLinear.from_weight(weight, linear.bias, dtype or linear.weight.dtype, low)
        layer.train(linear.training)
        if not linear.weight.is_meta:
            layer.to(linear.weight.device)
        for alias in names[id(linear)]:
            parent, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)


def sparse_linears(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """(name, layer) of every `SparseLinear` in the model, as `named_modules` walks."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module
