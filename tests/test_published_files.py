"""Readers against files that the original tools wrote (tests/data/published/README.md says which and how)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_published_packers import PACKERS, Tensors

from marlin.formats.published import (
    AWQ,
    GPTQ,
    GPTQ_MARLIN_24,
    MARLIN,
    MARLIN_24,
    PACK_QUANTIZED,
    Facts,
    Format,
    read_bitmask,
    write_pack_quantized,
)

DATA = Path(__file__).parent / "data" / "published"
V1 = Facts(zero_nibble=7)
FILES: dict[str, tuple[Format, Facts, str, int]] = {
    "ct_marlin24_channel": (MARLIN_24, Facts((-1,)), "w4a16_sp24", -1),
    "ct_marlin24_g128": (MARLIN_24, Facts((128,)), "w4a16_sp24", 128),
    "ct_marlin24_g128_half_k": (MARLIN_24, Facts((128,)), "w4a16_sp24", 128),
    "gptq_marlin24_channel": (GPTQ_MARLIN_24, Facts((-1,)), "w4a16_sp24", -1),
    "gptq_marlin24_g128": (GPTQ_MARLIN_24, Facts((128,)), "w4a16_sp24", 128),
    "marlin_g128_sp24": (MARLIN, Facts((128,)), "w4a16_sp24", 128),
    "marlin_channel": (MARLIN, Facts((-1,)), "w4a16_dense", -1),
    "ct_pack_quantized_g32_sp24": (PACK_QUANTIZED, Facts((32,)), "w4a16_sp24", 32),
    "ct_pack_quantized_channel": (PACK_QUANTIZED, Facts((-1,)), "w4a16_dense", -1),
    "gptq_g64_sp24": (GPTQ, V1, "w4a16_sp24", 64),
    "gptq_channel": (GPTQ, V1, "w4a16_dense", -1),
    "awq_g32_sp24": (AWQ, Facts((32,)), "w4a16_sp24", 32),
    "awq_g128": (AWQ, Facts((128,)), "w4a16_dense", 128),
}


def tensors_of(name: str) -> Tensors:
    return {key.rpartition(".")[2]: tensor for key, tensor in load_file(DATA / f"{name}.safetensors").items()}


@pytest.mark.parametrize("name", FILES)
def test_reader_gives_what_the_file_was_written_from(name: str):
    form, facts, kind, group_size = FILES[name]
    expected = load_file(DATA / f"{name}.expected.safetensors")
    weight = form.read(tensors_of(name), facts, "layer")
    assert (weight.kind, weight.group_size) == (kind, group_size)
    assert expected.keys() & {"codes", "dense"}
    if "codes" in expected:
        assert torch.equal(weight.dense_codes(), expected["codes"])
        assert weight.scales.dtype == expected["scales"].dtype
        assert torch.equal(weight.scales, expected["scales"])
    if "dense" in expected:
        # The reference of the GPTQ packer was rounded to float16, that of compressed-tensors was not.
        dtype = torch.float32 if "codes" in expected else torch.float16
        assert torch.equal(weight.to_dense(dtype).float(), expected["dense"])


@pytest.mark.parametrize("name", FILES)
def test_packer_of_the_tests_writes_the_same_file(name: str):
    form, facts, _, _ = FILES[name]
    written = tensors_of(name)
    packer = next(packer for other, packer in PACKERS.values() if other is form)
    packed = packer(form.read(written, facts, "layer"))
    assert packed.keys() == written.keys()
    for leaf, tensor in written.items():
        assert torch.equal(packed[leaf], tensor), leaf


def test_writer_gives_the_file_of_compressed_tensors_again():
    for name in ("ct_pack_quantized_g32_sp24", "ct_pack_quantized_channel"):
        form, facts, _, _ = FILES[name]
        written = tensors_of(name)
        again = write_pack_quantized(form.read(written, facts, "layer"))
        assert again.keys() == written.keys()
        for leaf, tensor in written.items():
            assert again[leaf].dtype == tensor.dtype and torch.equal(again[leaf], tensor), f"{name}: {leaf}"


def test_bitmask_gives_the_pruned_weight():
    dense, mask = read_bitmask(tensors_of("ct_sparse24_bitmask"))
    expected = load_file(DATA / "ct_sparse24_bitmask.expected.safetensors")["dense"]
    assert dense.dtype == expected.dtype and torch.equal(dense, expected)
    assert torch.equal(mask.view(64, -1, 4).sum(-1), torch.full((64, 32), 2))


@pytest.mark.parametrize("order", ["grouped where it is not", "not grouped where it is"])
def test_scale_order_of_other_cases_gives_other_scales(order: str):
    """Planted fault: the corner of K = 2 * group_size is one that a test can miss."""
    half, whole = tensors_of("ct_marlin24_g128_half_k"), tensors_of("ct_marlin24_g128")
    if order == "grouped where it is not":
        as_gptq = {"B_24": half["weight_packed"], "B_meta": half["meta"], "s": half["scale_packed"]}
        read, name = GPTQ_MARLIN_24.read(as_gptq, Facts(), ""), "ct_marlin24_g128_half_k"
    else:
        halves = {leaf: tensor[: tensor.shape[0] // 2] for leaf, tensor in whole.items()}
        read, name = MARLIN_24.read(halves, Facts(), ""), "ct_marlin24_g128"
    expected = load_file(DATA / f"{name}.expected.safetensors")["scales"][:, : read.scales.shape[1]]
    assert not torch.equal(read.scales, expected)
