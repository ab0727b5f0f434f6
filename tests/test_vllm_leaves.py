"""Cuts of packed tensors for tensor parallelism, and what a plugin without vLLM says. Needs no vLLM."""

from __future__ import annotations

import itertools
import logging
import sys

import pytest
import torch
from test_published_packers import PACKERS, random_weight
from torch import Tensor

from marlin.errors import CheckpointError, UnsupportedError
from marlin.formats.layouts import pack, unpack
from marlin.integrations import vllm as plugin
from marlin.integrations.vllm.leaves import Part, correction, packed_part

FORMS = {"marlin-24": "marlin-24", "gptq marlin_24": "gptq-marlin-24"}


def tensors_of(kind: str, n: int, k: int, group_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(dense values, tensors as in a checkpoint) of a random weight."""
    weight = random_weight(n, k, group_size, sparse=kind != "w4a16_dense")
    if kind in FORMS:
        return weight.to_dense(torch.float32), PACKERS[FORMS[kind]][1](weight)
    packed = pack(weight)
    tensors = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
    return weight.to_dense(torch.float32), {name: t for name, t in tensors.items() if t is not None}


def cut(part: Part, tensors: dict[str, Tensor], start: tuple[int, int]) -> Tensor:
    """Dense values of the rank's weight that begins at row and column `start`."""
    cuts = {x.name: x.cut("layer", tensors[x.name], start, x.shape(part.n, part.k)).clone() for x in part.leaves}
    return unpack(packed_part("layer", part, cuts, torch.float16)).to_dense(torch.float32)


CASES = [
    pytest.param(kind, tp, axis, group_size, id=f"{kind.replace(' ', '-')}-tp{tp}-{axis}-g{group_size}")
    for kind, tp, axis, group_size in itertools.product(
        ("w4a16_sp24", "w4a16_dense", *FORMS), (1, 2, 4, 8), "nk", (64, -1)
    )
]


@pytest.mark.parametrize(("kind", "tp", "axis", "group_size"), CASES)
def test_ranks_hold_slices_of_the_weight(kind: str, tp: int, axis: str, group_size: int):
    n, k = (512, 128) if axis == "n" else (64, 1024)
    dense, tensors = tensors_of(kind, n, k, group_size)
    own_n, own_k = (n // tp, k) if axis == "n" else (n, k // tp)
    part = Part(kind, own_n, own_k, group_size, 1 if group_size == -1 else k // group_size)
    part.check_cut("layer", axis == "n", axis == "k")
    for rank in range(tp):
        row, column = (rank * own_n, 0) if axis == "n" else (0, rank * own_k)
        assert torch.equal(cut(part, tensors, (row, column)), dense[row : row + own_n, column : column + own_k])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("axis", "nk")
def test_ranks_hold_slices_of_the_correction(axis: str, tp: int):
    n, k, rank_of_it = 128, 256, 3
    up, down = torch.randn(n, rank_of_it), torch.randn(rank_of_it, k)
    tensors = {"low_rank_up": up, "low_rank_down": down}
    own_n, own_k = (n // tp, k) if axis == "n" else (n, k // tp)
    part = Part("w4a16_sp24", own_n, own_k, 64, k // 64, rank_of_it)
    leaves = [leaf for leaf in part.leaves if leaf.name in tensors]
    assert [leaf.shape(n, k) for leaf in leaves] == [(n, rank_of_it), (rank_of_it, k)]
    for rank in range(tp):
        start = (rank * own_n, 0) if axis == "n" else (0, rank * own_k)
        cuts = {leaf.name: leaf.cut("layer", tensors[leaf.name], start, leaf.shape(own_n, own_k)) for leaf in leaves}
        low = correction("layer", cuts)
        assert low is not None and torch.equal(low.up, up[start[0] : start[0] + own_n])
        assert torch.equal(low.down, down[:, start[1] : start[1] + own_k])


@pytest.mark.parametrize(("kind", "k", "group_size"), [("marlin-24", 128, 64), ("gptq marlin_24", 128, 64)])
def test_two_groups_are_cut_to_one_in_their_own_order(kind: str, k: int, group_size: int):
    dense, tensors = tensors_of(kind, 64, k, group_size)
    part = Part(kind, 64, k // 2, group_size, 2)
    if kind == "marlin-24":
        assert torch.equal(cut(part, tensors, (0, k // 2)), dense[:, k // 2 :])
        return
    with pytest.raises(ValueError) as caught:
        cut(part, tensors, (0, 0))
    assert str(caught.value) == (
        "layer: a rank must hold at least 2 of the 2 groups of K in gptq marlin_24; got K=64 a rank. "
        "Convert it to our format: marlin convert DIR OUT."
    )


@pytest.mark.parametrize(
    ("part", "along", "text"),
    [
        (
            Part("w4a16_sp24", 96, 64, 64, 1),
            (True, False),
            "layer: codes can be cut at multiples of 64; got 96. "
            "Use another tensor-parallel size, or pipeline parallelism.",
        ),
        (
            Part("w4a16_sp24", 64, 96, 32, 3),
            (False, True),
            "layer: codes can be cut at multiples of 64; got 96. "
            "Use another tensor-parallel size, or pipeline parallelism.",
        ),
        (
            Part("marlin-24", 64, 192, 128, 2),
            (False, True),
            "layer: scale_packed can be cut at multiples of 128; got 192. "
            "Use another tensor-parallel size, or pipeline parallelism.",
        ),
    ],
    ids=["rows-in-a-tile", "columns-in-a-tile", "columns-in-a-group"],
)
def test_cut_within_a_step_is_refused(part: Part, along: tuple[bool, bool], text: str):
    with pytest.raises(ValueError) as caught:
        part.check_cut("layer", *along)
    assert str(caught.value) == text


def test_cut_beyond_the_tensor_is_refused():
    _, tensors = tensors_of("w4a16_sp24", 128, 64, 64)
    part = Part("w4a16_sp24", 128, 64, 64, 1)
    with pytest.raises(CheckpointError) as caught:
        cut(part, tensors, (128, 0))
    assert str(caught.value) == (
        "layer: codes must hold 2..4 along dimension 0; got shape (2, 1, 256). Copy the files again."
    )


def test_illegal_metadata_and_infinite_scales_are_refused_on_loading():
    _, tensors = tensors_of("w4a16_sp24", 64, 64, 64)
    part = Part("w4a16_sp24", 64, 64, 64, 1)
    with pytest.raises(CheckpointError, match="an illegal nibble in meta"):
        cut(part, {**tensors, "meta": torch.zeros_like(tensors["meta"])}, (0, 0))
    with pytest.raises(CheckpointError, match="Scales beyond float16 need --dtype bfloat16"):
        cut(part, {**tensors, "scales": tensors["scales"] / 0}, (0, 0))


def test_register_names_the_versions_that_work_where_vllm_is_missing_or_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name in [name for name in sys.modules if name.startswith("marlin.integrations.vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("config", "kernel"):
        monkeypatch.delattr(plugin, name, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", None)
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.12.0")
    with pytest.raises(UnsupportedError) as caught:
        plugin.register()
    text = str(caught.value)
    assert text.startswith(
        "marlin.integrations.vllm: vLLM must have the interface of the tested versions 0.26.0, 0.33.0; "
        "got vLLM 0.12.0 (ModuleNotFoundError: "
    )
    assert text.endswith("Install vllm==0.33.0.")
    with caplog.at_level(logging.ERROR, logger="vllm.sparse_marlin"):
        plugin.plugin()
    assert "Compressed models cannot be served." in caplog.text
