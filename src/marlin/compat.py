"""The names of the published Marlin and Sparse-Marlin: `Layer`, `Layer_2_4`, `mul`, `mul_2_4`, `replace_linear`.

Owns their signatures, attributes and buffer shapes, so that code written for them runs unchanged, and the way from
those shapes to the packed layout. The bits inside the buffers are ours: weights are packed here, not taken over from
buffers that the published code wrote. K and groupsize count dense positions and are never halved.
Source: github.com/IST-DASLab/marlin and github.com/IST-DASLab/Sparse-Marlin (signatures and shapes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from marlin.errors import message, require
from marlin.formats import int4
from marlin.formats.layouts import TILE_K, TILE_N, TILE_WORDS, pack
from marlin.formats.sparsity import top2_mask
from marlin.formats.weight import CompressedWeight, DenseInt4Weight, Weight
from marlin.ops import packed_linear, packed_linear_out

_OTHER_SHAPES = "For other shapes use marlin.SparseLinear, which pads."
# (thread_k, thread_n) that the published kernels were built for.
_THREAD_SHAPES = ((128, 128), (64, 256))


def _check_extents(op: str, k: int, n: int) -> None:
    fits = k > 0 and n > 0 and k % TILE_K == 0 and n % TILE_N == 0
    requirement = f"in-features must be a multiple of {TILE_K}, out-features of {TILE_N}"
    require(fits, op, requirement, f"in-features {k}, out-features {n}", _OTHER_SHAPES)


def _group_size(op: str, k: int, num_groups: int) -> int:
    """Group size of scales with so many rows. Raises: ValueError."""
    if num_groups == 1:
        return -1
    fits = num_groups > 0 and k % num_groups == 0 and k // num_groups in int4.GROUP_SIZES
    requirement = f"s must have k / groupsize rows with groupsize in {int4.GROUP_SIZES}"
    require(fits, op, requirement, f"k={k} with {num_groups} rows")
    return k // num_groups


def _buffer_shapes(kind: str, k: int, n: int, num_groups: int) -> dict[str, tuple[int, int]]:
    code_rows = k // 32 if kind == "w4a16_sp24" else k // 16
    shapes = {"B": (code_rows, 2 * n), "s": (num_groups, n)}
    return shapes | {"meta": (n, k // 16)} if kind == "w4a16_sp24" else shapes


def _check_buffers(op: str, kind: str, k: int, B: Tensor, meta: Tensor | None, s: Tensor) -> int:
    """Refuse buffers of other shapes, dtypes or strides; returns the group size. Raises: ValueError, TypeError."""
    require(s.ndim == 2, op, "s must have shape (k / groupsize, n)", str(tuple(s.shape)))
    n = s.shape[1]
    _check_extents(op, k, n)
    group_size = _group_size(op, k, s.shape[0])
    shapes = _buffer_shapes(kind, k, n, s.shape[0])
    for name, tensor, dtype in (("B", B, torch.int32), ("meta", meta, torch.int16), ("s", s, None)):
        if tensor is None:
            continue
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(message(op, f"{name} must be {dtype}", str(tensor.dtype)))
        got = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        good = tuple(tensor.shape) == shapes[name] and tensor.is_contiguous()
        require(good, op, f"{name} must be contiguous with shape {shapes[name]} for k={k}, n={n}", got)
    return group_size


def _operands(
    kind: str, k: int, B: Tensor, meta: Tensor | None, s: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, None]:
    """The buffers as packed tensors, sharing memory."""
    tiles = (s.shape[1] // TILE_N, k // TILE_K)
    code_words, meta_words = TILE_WORDS[kind]
    words = None if meta is None else meta.view(torch.int32).view(*tiles, meta_words)
    return B.view(*tiles, code_words), words, s.view(tiles[0], s.shape[0], TILE_N), None


def _check_threads(op: str, k: int, n: int, thread_k: int, thread_n: int) -> None:
    """Refuse the tile shapes that the published kernels refuse; the plan is chosen by marlin.runtime either way."""
    if thread_k == -1 or thread_n == -1:
        return
    got = f"thread shape ({thread_k}, {thread_n}) for k={k}, n={n}"
    known = (thread_k, thread_n) in _THREAD_SHAPES
    require(known, op, f"the thread shape must be one of {_THREAD_SHAPES}", got, "Leave it at -1.")
    fits = k % thread_k == 0 and n % thread_n == 0
    require(fits, op, "the thread shape must divide k and n", got, "Leave it at -1.")


def _multiply(op: str, kind: str, A: Tensor, buffers: tuple[Tensor, Tensor | None, Tensor], C: Tensor) -> None:
    B, meta, s = buffers
    require(A.ndim == 2, op, "A must have 2 dimensions", str(tuple(A.shape)))
    m, k = A.shape
    group_size = _check_buffers(op, kind, k, B, meta, s)
    n = s.shape[1]
    require(tuple(C.shape) == (m, n), op, f"C must have shape {(m, n)}", str(tuple(C.shape)))
    operands = _operands(kind, k, B, meta, s)
    if C.is_contiguous():
        packed_linear_out(kind, A, operands, n, group_size, C)
    else:
        C.copy_(packed_linear(kind, A, operands, n, group_size))


def mul(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """C = A @ weight.T with a dense INT4 weight, from the buffers of `Layer`.

    Shapes: A (m, k) and C (m, n) fp16 or bf16 like s; B int32 (k/16, 2n); s (k/groupsize, n).
    workspace, sms and max_par are accepted and not needed; thread_k and thread_n are checked and do not matter.
    Raises: ValueError (shapes, thread shape), TypeError (dtypes).
    """
    _check_workspace("mul", workspace)
    _check_threads("mul", A.shape[-1], s.shape[-1], thread_k, thread_n)
    _multiply("mul", "w4a16_dense", A, (B, None, s), C)


def mul_2_4(
    A: Tensor,
    B: Tensor,
    meta: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int = -1,
    thread_m: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """C = A @ weight.T with a 2:4 INT4 weight, from the buffers of `Layer_2_4`.

    Shapes, in the published letters: A (n, k) and C (n, m) fp16 or bf16 like s; B int32 (k/32, 2m); meta int16
    (m, k/16); s (k/groupsize, m). The other arguments are as in `mul`.
    Raises: ValueError (shapes, thread shape), TypeError (dtypes).
    """
    _check_workspace("mul_2_4", workspace)
    _check_threads("mul_2_4", A.shape[-1], s.shape[-1], thread_k, thread_m)
    _multiply("mul_2_4", "w4a16_sp24", A, (B, meta, s), C)


def _check_workspace(op: str, workspace: object) -> None:
    if not isinstance(workspace, Tensor):
        raise TypeError(message(op, "workspace must be a tensor (it is not used)", type(workspace).__name__))


class _PublishedLayer(nn.Module):
    """State and packing that both published layers share."""

    kind: str
    B: Tensor
    s: Tensor
    meta: Tensor | None

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int = -1) -> None:
        super().__init__()
        op = type(self).__name__
        _check_extents(op, infeatures, outfeatures)
        groups = 1 if groupsize == infeatures else int4.num_groups(infeatures, groupsize, op)
        self.k, self.n = infeatures, outfeatures
        self.groupsize = infeatures // groups
        shapes = _buffer_shapes(self.kind, infeatures, outfeatures, groups)
        self.register_buffer("B", torch.zeros(shapes["B"], dtype=torch.int32))
        if "meta" in shapes:
            self.register_buffer("meta", torch.zeros(shapes["meta"], dtype=torch.int16))
        self.register_buffer("s", torch.zeros(shapes["s"], dtype=torch.half))
        workspace = torch.zeros(outfeatures // 128 * 16, dtype=torch.int32)
        self.register_buffer("workspace", workspace, persistent=False)

    def forward(self, A: Tensor) -> Tensor:
        """A (..., k) to (..., n), the product of `mul` or `mul_2_4`."""
        op, meta = type(self).__name__, getattr(self, "meta", None)
        k = A.shape[-1]
        group_size = _check_buffers(op, self.kind, k, self.B, meta, self.s)
        operands = _operands(self.kind, k, self.B, meta, self.s)
        return packed_linear(self.kind, A, operands, self.s.shape[1], group_size)

    @torch.no_grad()
    def pack(self, linear: nn.Linear, scales: Tensor, trans: bool = False) -> None:
        """Fill the buffers from a linear's weight, rounding it to code * scale with codes clamped to -8..7.

        Weight and scales share an orientation, and the shape of scales tells which: (groups, n) with weight (k, n),
        or (n, groups) with weight (n, k). `trans` decides only where both fit: True means (groups, n). A 2:4 layer
        keeps the two largest code magnitudes of four along k (`mask_creator`).
        Raises: ValueError (shapes, not finite), TypeError (dtype of the weight).
        """
        op, k, n = f"{type(self).__name__}.pack", self.k, self.n
        _check_extents(op, k, n)
        groups = k // self.groupsize if self.groupsize > 0 else 1
        group_size = _group_size(op, k, groups)
        weight, scales = _torch_orientation(op, linear.weight, scales, (n, k, groups), trans)
        meta = getattr(self, "meta", None)
        _check_buffers(op, self.kind, k, self.B, meta, self.s)
        require(self.s.shape == (groups, n), op, f"s must have shape {(groups, n)}", str(tuple(self.s.shape)))
        codes = int4.quantize(weight, scales)
        packed = pack(self._canonical(codes, scales, group_size), self.s.dtype)
        self.B.copy_(packed.codes.view_as(self.B))
        self.s.copy_(packed.scales.view_as(self.s))
        if meta is not None and packed.meta is not None:
            meta.copy_(packed.meta.view(torch.int16).view_as(meta))

    def _canonical(self, codes: Tensor, scales: Tensor, group_size: int) -> Weight:
        raise NotImplementedError


def _torch_orientation(
    op: str, weight: Tensor, scales: Tensor, extents: tuple[int, int, int], trans: bool
) -> tuple[Tensor, Tensor]:
    """weight (n, k) and scales (n, groups), whichever way they came. Raises: ValueError, TypeError."""
    n, k, groups = extents
    weight = weight.detach()
    if not weight.is_floating_point():
        raise TypeError(message(op, "linear.weight must be floating point", str(weight.dtype)))
    fits = {True: tuple(scales.shape) == (groups, n), False: tuple(scales.shape) == (n, groups)}
    got = str(tuple(scales.shape))
    require(any(fits.values()), op, f"scales must have shape {(groups, n)} or {(n, groups)}", got)
    transposed = trans if all(fits.values()) else fits[True]
    expected = (k, n) if transposed else (n, k)
    requirement = f"linear.weight must have shape {expected} with scales of shape {tuple(scales.shape)}"
    require(tuple(weight.shape) == expected, op, requirement, str(tuple(weight.shape)))
    require(bool(weight.isfinite().all()), op, "linear.weight must be finite", "NaN or infinity")
    scales = scales.to(weight.device)
    return (weight.t(), scales.t()) if transposed else (weight, scales)


class Layer(_PublishedLayer):
    """Dense INT4 linear layer without bias: buffers B int32 (k/16, 2n), s fp16 (k/groupsize, n), workspace int32.

    infeatures, outfeatures: multiples of 64. groupsize: 32, 64, 128, or -1 (or infeatures) for one scale per column.
    """

    kind = "w4a16_dense"

    def _canonical(self, codes: Tensor, scales: Tensor, group_size: int) -> Weight:
        return DenseInt4Weight(codes, scales.contiguous(), group_size)


class Layer_2_4(_PublishedLayer):
    """2:4-sparse INT4 linear layer without bias, for k in-features and m out-features (attributes k and n).

    Buffers B int32 (k/32, 2m), meta int16 (m, k/16), s fp16 (k/groupsize, m), workspace int32. Arguments as in `Layer`.
    """

    kind = "w4a16_sp24"

    def _canonical(self, codes: Tensor, scales: Tensor, group_size: int) -> Weight:
        return CompressedWeight.from_codes(codes, top2_mask(codes.abs()), scales.contiguous(), group_size)


def replace_linear(
    module: nn.Module, name_filter: Callable[[str], bool] = lambda n: True, groupsize: int = -1, name: str = ""
) -> None:
    """Put an empty `Layer_2_4` in the place of every `torch.nn.Linear` below module whose dotted name passes.

    name: what the dotted names begin with. Every layer is checked before the first one changes.
    Raises: ValueError (a shape that does not fit, or a bias, which the published layers do not have).
    """
    found = []
    for path, child in module.named_modules(remove_duplicate=False):
        full = f"{name}.{path}" if name else path
        if path and isinstance(child, nn.Linear) and name_filter(full):
            fix = "Exclude it with name_filter, or use marlin.replace_linears, which keeps biases."
            require(child.bias is None, "replace_linear", "layers must have no bias", full, fix)
            _check_extents(f"replace_linear[{full}]", child.in_features, child.out_features)
            if groupsize != child.in_features:
                int4.num_groups(child.in_features, groupsize, f"replace_linear[{full}]")
            found.append((path, child))
    for path, child in found:
        parent, _, attribute = path.rpartition(".")
        layer = Layer_2_4(child.in_features, child.out_features, groupsize)
        setattr(module.get_submodule(parent), attribute, layer.to(child.weight.device))
