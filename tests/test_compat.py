"""The published names on the CPU: signatures, buffer shapes, orientation, masks, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import marlin
from marlin._semi_structured_conversions import mask_creator
from marlin.formats import DenseInt4Weight, quantize, top2_mask
from marlin.testing import tolerance
from marlin.testing.cases import random_act, random_weight


def make_weight(k: int, n: int, group_size: int = -1):
    """codes int8 (n, k) of full range, scales fp16 (n, groups), fake-quantized weight fp16 (n, k)."""
    weight = random_weight(n, k, group_size, "w4a16_dense")
    return weight.codes, weight.scales, weight.to_dense()


def make_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(8, 8, bias=False)
    linear.weight.data = weight
    return linear


def make_layer(name: str, k: int, n: int, group_size: int = -1) -> nn.Module:
    """A layer brought to another shape by hand, as the published tests do, and packed."""
    _, scales, weight = make_weight(k, n, group_size)
    layer = getattr(marlin, name)(256, 256, groupsize=128 if group_size == 128 else -1)
    layer.k, layer.n = k, n
    layer.groupsize = k if group_size == -1 else group_size
    rows = k // 32 if name == "Layer_2_4" else k // 16
    layer.B = torch.empty((rows, 2 * n), dtype=torch.int)
    if name == "Layer_2_4":
        layer.meta = torch.empty((n, k // 16), dtype=torch.int16)
    layer.s = torch.empty((k // layer.groupsize, n), dtype=torch.half)
    layer.pack(make_linear(weight.t()), scales.t(), True)
    return layer


def reference(name: str, k: int, n: int, group_size: int = -1):
    weight = random_weight(n, k, group_size, "w4a16_dense")
    if name == "Layer":
        return weight
    return marlin.CompressedWeight.from_codes(weight.codes, top2_mask(weight.codes.abs()), weight.scales, group_size)


SIGNATURES = {
    "mul": "(A, B, C, s, workspace, thread_k=-1, thread_n=-1, sms=-1, max_par=16)",
    "mul_2_4": "(A, B, meta, C, s, workspace, thread_k=-1, thread_m=-1, sms=-1, max_par=16)",
    "Layer": "(infeatures, outfeatures, groupsize=-1)",
    "Layer_2_4": "(infeatures, outfeatures, groupsize=-1)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_published_ones(name):
    parameters = inspect.signature(getattr(marlin, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_replace_linear_and_pack_have_the_published_arguments():
    assert list(inspect.signature(marlin.replace_linear).parameters) == ["module", "name_filter", "groupsize", "name"]
    assert list(inspect.signature(marlin.Layer_2_4.pack).parameters) == ["self", "linear", "scales", "trans"]
    assert list(inspect.signature(marlin.Layer.pack).parameters) == ["self", "linear", "scales", "trans"]


@pytest.mark.parametrize(("groupsize", "rows"), [(-1, 1), (128, 4), (512, 1)])
def test_buffers_have_the_published_names_shapes_and_dtypes(groupsize, rows):
    sparse, dense = marlin.Layer_2_4(512, 256, groupsize), marlin.Layer(512, 256, groupsize)
    shapes = {name: (tuple(b.shape), b.dtype) for name, b in sparse.named_buffers()}
    assert shapes == {
        "B": ((16, 512), torch.int32),
        "meta": ((256, 32), torch.int16),
        "s": ((rows, 256), torch.float16),
        "workspace": ((32,), torch.int32),
    }
    shapes = {name: (tuple(b.shape), b.dtype) for name, b in dense.named_buffers()}
    assert shapes == {
        "B": ((32, 512), torch.int32),
        "s": ((rows, 256), torch.float16),
        "workspace": ((32,), torch.int32),
    }
    assert list(sparse.state_dict()) == ["B", "meta", "s"] and list(dense.state_dict()) == ["B", "s"]
    assert (sparse.k, sparse.n, sparse.groupsize) == (512, 256, 512 // rows)


SHAPES = [  # k, n, group_size
    pytest.param(64, 768, -1, id="one-tile-of-k"),
    pytest.param(192, 64, -1, id="odd-tiles-of-k"),
    pytest.param(256, 256, 128, id="grouped"),
    pytest.param(512, 128, 64, id="half-groups"),
]


@pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
@pytest.mark.parametrize("name", ["Layer", "Layer_2_4"])
def test_layer_and_mul_compute_the_packed_weight(name, k, n, group_size):
    layer, act = make_layer(name, k, n, group_size), random_act(5, k)
    weight = reference(name, k, n, group_size)
    out = torch.full((5, n), torch.nan, dtype=torch.half)
    workspace = torch.zeros(16)
    if name == "Layer":
        marlin.mul(act, layer.B, out, layer.s, workspace, 64, 64 * 4 if n % 256 == 0 else -1, -1)
    else:
        marlin.mul_2_4(act, layer.B, layer.meta, out, layer.s, workspace)
    tolerance.check(out, act, weight)
    assert torch.equal(layer(act.view(5, 1, k)).view(5, n), out)


@pytest.mark.parametrize("name", ["Layer", "Layer_2_4"])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("transposed", [False, True], ids=["torch-orientation", "k-by-n"])
def test_pack_reads_the_orientation_from_the_scales(name, trans, transposed):
    expected = make_layer(name, 128, 64, 32)
    _, scales, weight = make_weight(128, 64, 32)
    layer = getattr(marlin, name)(128, 64, 32)
    if transposed:
        layer.pack(make_linear(weight.t()), scales.t(), trans)
    else:
        layer.pack(make_linear(weight), scales, trans)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("trans", [False, True])
def test_pack_asks_trans_where_the_scales_fit_both_ways(trans):
    _, scales, weight = make_weight(2048, 64, 32)
    assert scales.shape == (64, 64)
    layer = marlin.Layer_2_4(2048, 64, 32)
    layer.pack(make_linear(weight.t() if trans else weight), scales.t() if trans else scales, trans)
    tolerance.check(layer(random_act(3, 2048)), random_act(3, 2048), reference("Layer_2_4", 2048, 64, 32))


def test_pack_clamps_codes_to_the_range_of_int4():
    weight = torch.linspace(-20, 20, 64 * 64).view(64, 64).half()
    layer = marlin.Layer(64, 64)
    layer.pack(make_linear(weight), torch.ones(64, 1).half())
    codes = quantize(weight, torch.ones(64, 1))
    assert codes.min() == -8 and codes.max() == 7
    out = layer(torch.eye(64).half())
    assert torch.equal(out.T, DenseInt4Weight(codes, torch.ones(64, 1).half(), -1).to_dense())


def test_pack_keeps_the_largest_codes_of_four_and_agrees_with_mask_creator():
    codes, scales, weight = make_weight(128, 64)
    layer = marlin.Layer_2_4(128, 64)
    layer.pack(make_linear(weight.t()), scales.t(), True)
    stored = (codes.int() + 8).t()  # (k, n), as the published tests hold them
    mask = mask_creator(stored.T).bool()
    assert torch.equal(layer(torch.eye(128).half()).T, torch.where(mask, weight, 0))
    assert mask[codes < 0].float().mean() > 0.4


def test_mask_creator_ranks_codes_by_their_distance_from_the_offset():
    codes = torch.tensor([[0, 15, 8, 9], [1, 2, 15, 14], [8, 8, 8, 8]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.float32)
    for dtype in (torch.int32, torch.int64, torch.uint8):
        assert torch.equal(mask_creator(codes.to(dtype)), expected)


def test_mask_creator_ranks_floats_by_magnitude():
    for dtype in (torch.float16, torch.float32):
        mask = mask_creator(torch.tensor([[-3.0, 1.0, 2.0, 0.5], [1.0, -1.0, 1.0, 0.0]], dtype=dtype))
        assert mask.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]] and mask.dtype == torch.float32


def test_mask_creator_groups_in_row_major_order_as_published():
    assert mask_creator(torch.arange(8.0).view(4, 2)).tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.ones(3), ValueError, "mask_creator: the number of entries must be a multiple of 4; got (3,)."),
        (
            torch.ones(4, dtype=torch.bool),
            TypeError,
            "mask_creator: tensor must hold real numbers or INT4 codes; got torch.bool.",
        ),
    ],
    ids=["entries", "bool"],
)
def test_mask_creator_refuses(tensor, error, text):
    with pytest.raises(error) as caught:
        mask_creator(tensor)
    assert str(caught.value) == text


def test_mul_writes_into_outputs_that_are_not_contiguous():
    layer, act = make_layer("Layer_2_4", 64, 128), random_act(4, 64)
    wide = torch.zeros(4, 256).half()
    marlin.mul_2_4(act, layer.B, layer.meta, wide[:, 64:192], layer.s, layer.workspace)
    assert torch.equal(wide[:, 64:192], layer(act))
    assert not wide[:, :64].any() and not wide[:, 192:].any()


def call(**changes: object) -> None:
    layer = make_layer("Layer_2_4", 128, 256)
    arguments = {"A": random_act(4, 128), "B": layer.B, "meta": layer.meta, "C": torch.zeros(4, 256).half()}
    arguments |= {"s": layer.s, "workspace": layer.workspace}
    marlin.mul_2_4(**(arguments | changes))


MUL_REFUSALS = [
    pytest.param(
        {"thread_k": 256, "thread_m": 256},
        "mul_2_4: the thread shape must be one of ((128, 128), (64, 256)); got thread shape (256, 256) for k=128, "
        "n=256. Leave it at -1.",
        id="unknown-threads",
    ),
    pytest.param(
        {"A": random_act(4, 64), "thread_k": 128, "thread_m": 128},
        "mul_2_4: the thread shape must divide k and n; got thread shape (128, 128) for k=64, n=256. Leave it at -1.",
        id="threads-and-k",
    ),
    pytest.param(
        {"s": torch.ones(3, 256).half()},
        "mul_2_4: s must have k / groupsize rows with groupsize in (32, 64, 128, -1); got k=128 with 3 rows.",
        id="groups",
    ),
    pytest.param(
        {"A": random_act(4, 192)},
        "mul_2_4: B must be contiguous with shape (6, 512) for k=192, n=256; got (4, 512) with strides (512, 1).",
        id="k",
    ),
    pytest.param({"C": torch.zeros(4, 128).half()}, "mul_2_4: C must have shape (4, 256); got (4, 128).", id="c"),
    pytest.param(
        {"meta": torch.zeros(128, 16, dtype=torch.int16)},
        "mul_2_4: meta must be contiguous with shape (256, 8) for k=128, n=256; got (128, 16) with strides (16, 1).",
        id="meta",
    ),
]


@pytest.mark.parametrize(("changes", "text"), MUL_REFUSALS)
def test_mul_refuses(changes, text):
    with pytest.raises(ValueError) as caught:
        call(**changes)
    assert str(caught.value) == text


def test_mul_refuses_wrong_types():
    with pytest.raises(TypeError) as caught:
        call(workspace=None)
    assert str(caught.value) == "mul_2_4: workspace must be a tensor (it is not used); got NoneType."
    with pytest.raises(TypeError) as caught:
        call(meta=torch.zeros(256, 8, dtype=torch.int32))
    assert str(caught.value) == "mul_2_4: meta must be torch.int16; got torch.int32."


def test_layers_refuse_shapes_that_would_need_padding_and_name_the_way_out():
    with pytest.raises(ValueError) as caught:
        marlin.Layer_2_4(96, 256)
    assert str(caught.value) == (
        "Layer_2_4: in-features must be a multiple of 64, out-features of 64; got in-features 96, out-features 256. "
        "For other shapes use marlin.SparseLinear, which pads."
    )


@pytest.mark.parametrize(
    ("weight", "scales", "text"),
    [
        (
            torch.zeros(64, 128),
            torch.ones(64, 3),
            "Layer_2_4.pack: scales must have shape (1, 64) or (64, 1); got (64, 3).",
        ),
        (
            torch.zeros(64, 128),
            torch.ones(1, 64),
            "Layer_2_4.pack: linear.weight must have shape (128, 64) with scales of shape (1, 64); got (64, 128).",
        ),
        (
            torch.full((64, 128), torch.inf),
            torch.ones(64, 1),
            "Layer_2_4.pack: linear.weight must be finite; got NaN or infinity.",
        ),
    ],
    ids=["scales", "orientation", "infinite"],
)
def test_pack_refuses(weight, scales, text):
    with pytest.raises(ValueError) as caught:
        marlin.Layer_2_4(128, 64).pack(make_linear(weight.half()), scales.half())
    assert str(caught.value) == text


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256, bias=bias)
        self.body = nn.Sequential(nn.Linear(256, 128, bias=False), nn.ReLU())
        self.head = nn.Linear(128, 100, bias=False)


def test_replace_linear_replaces_what_the_filter_names():
    model, seen = Model(), []

    def keep(name: str) -> bool:
        seen.append(name)
        return not name.endswith("head")

    marlin.replace_linear(model, keep, groupsize=128, name="model")
    assert seen == ["model.up", "model.body.0", "model.head"]
    assert isinstance(model.up, marlin.Layer_2_4) and isinstance(model.body[0], marlin.Layer_2_4)
    assert (model.body[0].k, model.body[0].n, model.body[0].groupsize) == (256, 128, 128)
    assert isinstance(model.head, nn.Linear)


def test_replace_linear_refuses_before_any_layer_changes():
    model = Model()
    with pytest.raises(ValueError) as caught:
        marlin.replace_linear(model)
    assert str(caught.value) == (
        "replace_linear[head]: in-features must be a multiple of 64, out-features of 64; got in-features 128, "
        "out-features 100. For other shapes use marlin.SparseLinear, which pads."
    )
    assert isinstance(model.up, nn.Linear)
    with pytest.raises(ValueError) as caught:
        marlin.replace_linear(Model(bias=True), lambda name: name == "up")
    assert str(caught.value) == (
        "replace_linear: layers must have no bias; got up. "
        "Exclude it with name_filter, or use marlin.replace_linears, which keeps biases."
    )
