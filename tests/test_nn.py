"""`SparseLinear` and putting it into a model: state, casts, construction, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import marlin
from marlin.formats import CompressedWeight, DenseInt4Weight, expand_scales, group_scales, quantize, top2_mask
from marlin.nn import SparseLinear, replace_linears, sparse_linears
from marlin.testing import tolerance
from marlin.testing.cases import random_weight

KINDS = ("w4a16_sp24", "w4a16_dense")


def make_layer(kind: str = "w4a16_sp24", dtype: torch.dtype = torch.float16) -> SparseLinear:
    weight = random_weight(72, 96, 32, kind, dtype=dtype)
    return SparseLinear.from_weight(weight, torch.linspace(-1, 1, 72).to(dtype))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_linear_computes_its_weight_and_bias(kind):
    layer, act = make_layer(kind), torch.randn(2, 3, 96).half()
    out = layer(act)
    assert out.shape == (2, 3, 72) and out.dtype == torch.float16
    tolerance.check(out, act, layer.to_weight(), layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_linear_gives_back_its_weight(kind):
    weight = random_weight(72, 96, 32, kind)
    layer = SparseLinear.from_weight(weight)
    again = layer.to_weight()
    assert layer.bias is None and again.kind == layer.packed.kind == kind
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scales, weight.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_layer_has_the_state_of_a_filled_one_and_computes_zero(kind):
    layer = SparseLinear(96, 72, kind=kind, group_size=32, bias=True)
    filled = make_layer(kind)
    assert {k: (v.shape, v.dtype) for k, v in layer.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in filled.state_dict().items()
    }
    assert not layer(torch.randn(3, 96).half()).any()
    layer.load_state_dict(filled.state_dict())
    assert same_state(layer, filled)


def test_state_names_are_those_of_checkpoints():
    assert list(make_layer().state_dict()) == ["bias", "codes", "meta", "scales"]
    assert list(make_layer("w4a16_dense").state_dict()) == ["bias", "codes", "scales"]


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_linear_survives_pickle_deepcopy_and_torch_save(kind):
    layer, act = make_layer(kind), torch.randn(3, 96).half()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert same_state(layer, again) and repr(again) == repr(layer)
        assert torch.equal(again(act), layer(act))


def test_sparse_linear_builds_and_loads_on_meta():
    with torch.device("meta"):
        layer = SparseLinear(96, 72, group_size=32, bias=True)
    assert layer.codes.is_meta and layer(torch.empty(3, 96, dtype=torch.float16, device="meta")).shape == (3, 72)
    filled = make_layer()
    layer.load_state_dict(filled.state_dict(), assign=True)
    assert same_state(layer, filled)
    layer = SparseLinear(96, 72, group_size=32, bias=True, device="meta").to_empty(device="cpu")
    layer.load_state_dict(filled.state_dict())
    assert same_state(layer, filled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])
def test_cast_changes_scales_and_bias_and_never_codes(dtype, whole):
    layer = make_layer()
    before = copy.deepcopy(layer)
    (nn.Sequential(layer) if whole else layer).to(dtype)
    assert layer.scales.dtype == layer.bias.dtype == layer(torch.randn(2, 96).to(dtype)).dtype == dtype
    assert torch.equal(layer.codes, before.codes) and torch.equal(layer.meta, before.meta)
    assert torch.equal(layer.scales, before.scales.to(dtype))


def test_cast_to_float64_is_refused_and_leaves_the_layer_whole():
    layer = make_layer()
    before = copy.deepcopy(layer)
    with pytest.raises(TypeError) as caught:
        layer.double()
    assert str(caught.value) == "SparseLinear: dtype must be float16, bfloat16 or float32; got torch.float64."
    assert same_state(layer, before) and layer.scales.dtype == torch.float16


def test_cast_that_overflows_is_refused_and_leaves_the_layer_whole():
    layer = make_layer(dtype=torch.bfloat16)
    layer.scales[0, 0, 0] = 1e6
    with pytest.raises(ValueError) as caught:
        layer.half()
    assert str(caught.value) == (
        "SparseLinear: scales must be finite in torch.float16; got torch.bfloat16 scales up to 9.994e+05. "
        "Cast to torch.bfloat16."
    )
    assert layer.scales.dtype == layer.bias.dtype == torch.bfloat16


def test_repr_shows_what_the_layer_is():
    assert repr(make_layer()) == (
        "SparseLinear(in_features=96, out_features=72, kind=w4a16_sp24, group_size=32, bias=True, dtype=torch.float16)"
    )


def test_training_reaches_the_bias_alone():
    layer = make_layer(dtype=torch.float32)
    layer(torch.randn(4, 96)).square().sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.bias.grad.shape == (72,)


def test_layer_compiles_whole_with_dynamic_m():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 5):
        act = torch.randn(m, 96).half()
        assert torch.equal(compiled(act), layer(act))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"in_features": 100, "out_features": 72, "group_size": 32},
            "SparseLinear: in_features must be a multiple of 32; got 100. "
            "Pad to 128 with zeros, or leave this layer dense.",
        ),
        (
            {"in_features": 96, "out_features": 70, "group_size": 32},
            "SparseLinear: out_features must be a multiple of 8; got 70. "
            "Pad to 72 with zeros, or leave this layer dense.",
        ),
        (
            {"in_features": 96, "out_features": 72},
            "SparseLinear: K must be a multiple of group_size=128; got K=96. "
            "Use a smaller group_size, or -1 for one scale per row.",
        ),
        (
            {"in_features": 96, "out_features": 72, "kind": "int4"},
            "SparseLinear: kind must be one of ('w4a16_sp24', 'w4a16_dense'); got 'int4'.",
        ),
    ],
    ids=["k", "n", "group-size", "kind"],
)
def test_sparse_linear_refuses_shapes_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError) as caught:
        SparseLinear(**arguments)
    assert str(caught.value) == text


class TestFromDense:
    """Masks, scales and codes from a dense layer, chosen or given."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_two_largest_of_four_and_the_bias(self, dtype):
        linear = nn.Linear(96, 72, dtype=dtype)
        layer = SparseLinear.from_dense(linear, group_size=32)
        weight = layer.to_weight()
        assert isinstance(weight, CompressedWeight)
        assert torch.equal(weight.mask(), top2_mask(linear.weight.detach().abs()))
        assert layer.scales.dtype == dtype and torch.equal(layer.bias, linear.bias)
        assert layer.bias is not linear.bias

    @pytest.mark.parametrize("kind", KINDS)
    def test_codes_are_nearest_and_the_searched_scales_beat_the_range(self, kind):
        dense = torch.randn(72, 96)
        weight = SparseLinear.from_dense(dense, group_size=32, kind=kind).to_weight()
        mask = weight.mask() if isinstance(weight, CompressedWeight) else torch.ones(72, 96, dtype=torch.bool)
        assert torch.equal(weight.dense_codes(), quantize(dense, weight.scales) * mask)
        plain = group_scales(dense, 32, mask)
        errors = [
            ((quantize(dense, s) * expand_scales(s, 96) - dense) * mask).square().sum() for s in (weight.scales, plain)
        ]
        assert errors[0] < 0.95 * errors[1]

    def test_takes_a_mask_and_scales(self):
        dense, mask = torch.randn(72, 96), top2_mask(torch.rand(72, 96))
        scales = torch.full((72, 1), 0.25)
        weight = SparseLinear.from_dense(dense, group_size=-1, mask=mask, scales=scales).to_weight()
        assert torch.equal(weight.mask(), mask) and torch.equal(weight.scales, scales)

    def test_takes_weights_below_the_smallest_scale(self):
        layer = SparseLinear.from_dense(torch.full((8, 32), 1e-7).half(), group_size=32)
        assert not layer(torch.ones(1, 32).half()).any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_exact_loses_nothing(self, kind):
        weight = random_weight(72, 96, 32, kind)
        layer = SparseLinear.from_dense(weight.to_dense(), group_size=32, scales=weight.scales, exact=True, kind=kind)
        assert torch.equal(layer.to_weight().to_dense(), weight.to_dense())

    def test_exact_refuses_a_weight_that_is_not_quantized(self):
        dense = torch.randn(72, 96)
        mask = top2_mask(dense.abs())
        with pytest.raises(ValueError, match="weight must already be fake-quantized with these scales"):
            SparseLinear.from_dense(dense, group_size=32, mask=mask, scales=group_scales(dense, 32, mask), exact=True)

    @pytest.mark.parametrize(
        ("dense", "arguments", "text"),
        [
            (
                torch.randn(72, 96),
                {"exact": True, "group_size": 32},
                "SparseLinear.from_dense: exact=True needs the scales that the weight was quantized with; got None.",
            ),
            (
                torch.randn(72, 96),
                {"kind": "w4a16_dense", "mask": torch.ones(72, 96, dtype=torch.bool), "group_size": 32},
                "SparseLinear.from_dense: a dense INT4 weight takes no mask; got a mask.",
            ),
            (
                torch.randn(72, 90),
                {},
                "SparseLinear.from_dense: in_features must be a multiple of 32; got 90. "
                "Pad to 96 with zeros, or leave this layer dense.",
            ),
            (
                torch.randn(72, 96),
                {},
                "SparseLinear.from_dense: K must be a multiple of group_size=128; got K=96. "
                "Use a smaller group_size, or -1 for one scale per row.",
            ),
            (
                torch.full((8, 32), torch.nan),
                {"group_size": 32},
                "SparseLinear.from_dense: weight must be finite; got NaN or infinity. Check the checkpoint.",
            ),
            (
                torch.randn(72, 96),
                {"scales": torch.ones(72, 2), "group_size": 32},
                "SparseLinear.from_dense: scales must have shape (72, 3); got (72, 2).",
            ),
            (
                torch.randn(8, 32),
                {"bias": torch.ones(7), "group_size": 32},
                "SparseLinear: bias must have shape [8]; got (7,).",
            ),
        ],
        ids=["exact-without-scales", "dense-mask", "k", "group-size", "nan", "scales", "bias"],
    )
    def test_refuses(self, dense, arguments, text):
        with pytest.raises(ValueError) as caught:
            SparseLinear.from_dense(dense, **arguments)
        assert str(caught.value) == text


class Block(nn.Module):
    """Linears at two depths, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(96, 72)
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(72 + 24, 96, bias=False))
        self.tied = self.up
        self.half()


WEIGHTS = {"up": random_weight(72, 96, 32), "inner.1": random_weight(96, 96, -1, "w4a16_dense")}


class TestReplaceLinears:
    """A model's layers exchanged in place, all or none."""

    def test_replaces_the_named_layers_and_keeps_their_biases(self):
        model = Block().eval()
        bias = model.up.bias.detach().clone()
        replace_linears(model, WEIGHTS)
        assert [name for name, _ in sparse_linears(model)] == ["up", "inner.1"]
        assert torch.equal(model.up.bias, bias) and model.inner[1].bias is None
        assert model.up.scales.dtype == torch.float16 and not model.up.training
        assert torch.equal(model.up.to_weight().codes, WEIGHTS["up"].codes)
        assert model.inner[1].kind == "w4a16_dense"

    def test_replaces_a_layer_under_all_its_names(self):
        model = Block()
        replace_linears(model, {"up": WEIGHTS["up"]})
        assert isinstance(model.up, SparseLinear) and model.tied is model.up

    def test_casts_when_asked(self):
        model = Block()
        replace_linears(model, WEIGHTS, dtype=torch.bfloat16)
        assert model.up.scales.dtype == model.up.bias.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("weights", "text"),
        [
            (
                {"up": WEIGHTS["up"], "down": WEIGHTS["up"]},
                "replace_linears: names must be those of model.named_modules(); got 'down'.",
            ),
            (
                {"up": WEIGHTS["up"], "inner.0": WEIGHTS["up"]},
                "replace_linears: only torch.nn.Linear can be replaced; got inner.0: ReLU.",
            ),
            (
                {"up": WEIGHTS["up"], "inner.1": WEIGHTS["up"]},
                "replace_linears: the weight must have the layer's shape (96, 96); got inner.1: weight (72, 96).",
            ),
        ],
        ids=["name", "type", "shape"],
    )
    def test_refuses_before_any_layer_changes(self, weights, text):
        model = Block()
        with pytest.raises(ValueError) as caught:
            replace_linears(model, weights)
        assert str(caught.value) == text
        assert not list(sparse_linears(model))

    def test_refuses_to_lose_a_bias_that_has_no_values(self):
        model = Block().to("meta")
        with pytest.raises(ValueError) as caught:
            replace_linears(model, WEIGHTS)
        assert str(caught.value) == (
            "replace_linears: biases must have values; got up: bias on the meta device. Load the model first."
        )


def test_public_names_resolve_and_compress_is_called_or_imported_from():
    import marlin.compress as package

    assert marlin.SparseLinear is SparseLinear and marlin.DenseInt4Weight is DenseInt4Weight
    for name in marlin.__all__:
        assert getattr(marlin, name) is not None
    assert marlin.compress is package and callable(marlin.compress) and package.Recipe is marlin.Recipe
    with pytest.raises(AttributeError) as caught:
        _ = marlin.no_such_name
    assert str(caught.value) == "module 'marlin' has no attribute 'no_such_name'"
