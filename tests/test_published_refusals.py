"""What cannot be read is refused by name, with the way out: tensors, configs, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_published_packers import PACKERS, Tensors, pack_awq, pack_bitmask, pack_gptq, random_weight

from marlin.errors import CheckpointError
from marlin.formats import top2_mask
from marlin.formats.published import GPTQ, Facts, describe_published, open_published, read_bitmask

V1 = Facts(zero_nibble=7)
AGAIN = "Compress the unquantized model instead: marlin compress MODEL OUT."
COPY = "Copy or download all of the files again."


def _tensors(name: str) -> Tensors:
    return PACKERS[name][1](random_weight(64, 128, 32, sparse=True))


def _set(leaf: str, value: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(leaf, value(tensors))


def _drop(leaf: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(leaf)


ORDER = "groups must follow the columns (no activation reordering by"
SYMMETRIC = "quantization must be symmetric (zero points"
ALTERED: list[tuple[str, str, Callable[[Tensors], None], str]] = [
    (
        "marlin-24",
        "a tensor is missing",
        _drop("meta"),
        f"marlin-24, layer up: the layer must have tensors weight_packed, scale_packed, meta; got no meta. {COPY}",
    ),
    (
        "gptq-marlin-24",
        "a tensor too many",
        _set("weight", lambda t: t["s"]),
        f"gptq marlin_24, layer up: the layer may only have tensors B_24, s, B_meta, workspace; got weight. {AGAIN}",
    ),
    (
        "marlin-24",
        "8 bits have twice the words",
        _set("weight_packed", lambda t: torch.cat((t["weight_packed"],) * 2, 1)),
        "marlin-24, layer up: weights must have 4 bits; got 8 (weight_packed has 4 words per output row). " + AGAIN,
    ),
    (
        "marlin-24",
        "metadata of another shape",
        _set("meta", lambda t: t["meta"][:3]),
        f"marlin-24, layer up: meta must have shape [4, 128]; got [3, 128]. {COPY}",
    ),
    (
        "marlin-24",
        "metadata nibble 0",
        _set("meta", lambda t: torch.zeros_like(t["meta"])),
        "marlin-24, layer up: every nibble of meta must hold two rising positions (i0 | i1 << 2 with i0 < i1); "
        f"got an illegal nibble. {COPY}",
    ),
    (
        "marlin-24",
        "bfloat16 was never written",
        _set("scale_packed", lambda t: t["scale_packed"].bfloat16()),
        f"marlin-24, layer up: scales must be float16; got bfloat16. {COPY}",
    ),
    (
        "marlin",
        "infinite scale",
        _set("s", lambda t: t["s"] * float("inf")),
        f"marlin, layer up: scales must be finite; got NaN or infinity in torch.float16. {COPY}",
    ),
    (
        "marlin",
        "five groups in K = 128",
        _set("s", lambda t: torch.cat((t["s"], t["s"][:1]))),
        f"marlin, layer up: groups must have equal sizes along K; got K=128 with 5 scales per row. {AGAIN}",
    ),
    (
        "marlin",
        "group size 16",
        _set("s", lambda t: torch.cat((t["s"], t["s"]))),
        f"marlin, layer up: group_size must be 32, 64, 128 or all of K; got group_size=16 (K=128). {AGAIN}",
    ),
    (
        "pack-quantized",
        "asymmetric",
        _set("weight_zero_point", lambda t: torch.full((8, 4), 0x77777777, dtype=torch.int32)),
        f"pack-quantized, layer up: {SYMMETRIC} 0); got weight_zero_point with zero points from -1 to -1. {AGAIN}",
    ),
    (
        "pack-quantized",
        "actorder=group",
        _set("weight_g_idx", lambda t: torch.arange(128, dtype=torch.int32).flip(0) // 32),
        f"pack-quantized, layer up: {ORDER} weight_g_idx); got columns in another order. {AGAIN}",
    ),
    (
        "pack-quantized",
        "8 bits",
        _set("weight_packed", lambda t: torch.cat((t["weight_packed"],) * 2, 1)),
        f"pack-quantized, layer up: weights must have 4 bits; got 8 (weight_packed has K/4 words per row). {AGAIN}",
    ),
    (
        "pack-quantized",
        "shape of another weight",
        _set("weight_shape", lambda t: torch.tensor([64, 256])),
        f"pack-quantized, layer up: weight_packed must have shape [64, 32]; got [64, 16]. {COPY}",
    ),
    (
        "pack-quantized",
        "negative shape",
        _set("weight_shape", lambda t: torch.tensor([64, -128])),
        f"pack-quantized, layer up: weight_shape must hold N and K, both positive; got [64, -128]. {COPY}",
    ),
    (
        "gptq",
        "desc_act",
        _set("g_idx", lambda t: t["g_idx"].flip(0)),
        f"gptq, layer up: {ORDER} g_idx); got columns in another order (desc_act). "
        f"Quantize the model again with desc_act=False. {AGAIN}",
    ),
    (
        "gptq",
        "sym=False",
        _set("qzeros", lambda t: t["qzeros"] - 1),
        f"gptq, layer up: {SYMMETRIC} 8); got zero points from 7 to 8 in qzeros. {AGAIN}",
    ),
    (
        "gptq",
        "version 2 taken for version 1",
        _set("qzeros", lambda t: torch.full_like(t["qzeros"], -0x77777778)),
        f"gptq, layer up: {SYMMETRIC} 8); got zero points from 9 to 9 in qzeros. "
        'If they are stored as they are (GPTQ version 2), set "checkpoint_format": "gptq_v2" in the config.',
    ),
    (
        "gptq",
        "8 bits",
        _set("qzeros", lambda t: torch.cat((t["qzeros"],) * 2, 1)),
        f"gptq, layer up: weights must have 4 bits; got 8 (qzeros has N/4 words per group). {AGAIN}",
    ),
    (
        "awq",
        "asymmetric",
        _set("qzeros", lambda t: torch.full_like(t["qzeros"], 0x65656565)),
        f"awq, layer up: {SYMMETRIC} 8); got zero points from 5 to 6 in qzeros. {AGAIN}",
    ),
    (
        "awq",
        "rows of another K",
        _set("qweight", lambda t: t["qweight"][:, :4]),
        f"awq, layer up: qweight must have shape [*, 8]; got [128, 4]. {COPY}",
    ),
]


@pytest.mark.parametrize(("name", "reason", "alter", "text"), ALTERED, ids=[f"{a[0]}: {a[1]}" for a in ALTERED])
def test_reader_refuses(name: str, reason: str, alter: Callable[[Tensors], None], text: str):
    tensors = _tensors(name)
    alter(tensors)
    with pytest.raises(CheckpointError) as error:
        PACKERS[name][0].read(tensors, V1 if name == "gptq" else Facts(), "up")
    assert str(error.value) == text


def test_reader_takes_what_says_nothing():
    weight = random_weight(64, 128, 32, sparse=True)
    quantized = PACKERS["pack-quantized"][1](weight)
    quantized["weight_zero_point"] = torch.full((8, 4), -0x77777778, dtype=torch.int32)
    quantized["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    v2, without = pack_gptq(weight, zero_nibble=8), pack_gptq(weight)
    without.pop("g_idx")
    reads = [
        PACKERS["pack-quantized"][0].read(quantized, Facts(), ""),
        GPTQ.read(v2, Facts(), ""),
        GPTQ.read(without, V1, ""),
    ]
    for read in reads:
        assert torch.equal(read.to_dense(), weight.to_dense())


def test_reader_refuses_another_group_size_than_the_config():
    with pytest.raises(CheckpointError) as error:
        PACKERS["marlin"][0].read(_tensors("marlin"), Facts((128,)), "up")
    need = "tensors and config must have the same group_size"
    assert str(error.value) == f"marlin, layer up: {need}; got 32 in the tensors, 128 in the config. {COPY}"


def test_bitmask_refuses_a_mask_that_is_not_24():
    weight = torch.randn(64, 128)
    tensors = pack_bitmask(weight, top2_mask(weight))
    tensors["bitmask"][3, 5] = 0b0111_0101
    with pytest.raises(CheckpointError, match="bitmask must keep exactly 2 of every 4 along K; got another pattern"):
        read_bitmask(tensors, "up")


def _ct(weights: Any = None, **changes: Any) -> dict[str, Any]:
    entry = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": {**entry, **(weights or {})}, **changes.pop("group", {})}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {**base, **changes}


CONFIGS: list[tuple[Any, str]] = [
    ({"quant_method": "bitsandbytes"}, "quant_method must be one of compressed-tensors, gptq, awq, marlin; got 'bits"),
    ([], "it must be a JSON object; got list"),
    (_ct({"num_bits": 8}), "config_groups.group_0: weights must have 4 bits; got num_bits=8"),
    (_ct({"symmetric": False}), "quantization must be symmetric; got symmetric=False"),
    (_ct({"type": "float"}), "weights must be integers; got type='float'"),
    (_ct({"actorder": "group"}), "no activation reordering); got actorder='group'. Use actorder=static or none."),
    (_ct({"strategy": "tensor"}), "scales must be per group or per channel; got strategy='tensor'"),
    (_ct(group={"input_activations": {"num_bits": 8}}), "activations must not be quantized; got input_activations={"),
    (_ct(format="nvfp4-pack-quantized"), "format must be marlin-24 or pack-quantized, or sparse-24-bitmask in"),
    (_ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask without config_groups; got sparsity_"),
    (_ct(kv_cache_scheme={"num_bits": 8}), "the key-value cache must not be quantized; got kv_cache_scheme is set"),
    (_ct(transform_config={"config_groups": {}}), "weights must not need transforms at run time; got transform_config"),
    ({"quant_method": "gptq", "bits": 8}, "weights must have 4 bits; got bits=8"),
    ({"quant_method": "gptq", "bits": 4, "sym": False}, "quantization must be symmetric; got sym=False"),
    ({"quant_method": "gptq", "checkpoint_format": "gptq_v3"}, "checkpoint_format must be one of gptq, gptq_v2, marl"),
    ({"quant_method": "gptq", "group_size": "128"}, "group_size must be a positive integer or -1; got '128'"),
    ({"quant_method": "gptq", "dynamic": {"+:.*": {"bits": 8}}}, "all layers must be quantized alike; got dynamic"),
    ({"quant_method": "awq", "version": "gemv"}, "the order of AWQ must be \"gemm\"; got version='gemv'"),
]


@pytest.mark.parametrize(("config", "text"), CONFIGS, ids=range(len(CONFIGS)))
def test_config_is_refused_by_name(config: Any, text: str):
    with pytest.raises(CheckpointError) as error:
        describe_published(config, "config.json")
    assert str(error.value).startswith("config.json, quantization_config")
    assert text in str(error.value)


def test_config_names_format_and_group_sizes():
    cases: list[tuple[dict[str, Any], str, Facts]] = [
        (_ct(format="marlin-24", sparsity_config={"format": "dense"}), "marlin-24", Facts((128,))),
        (_ct({"strategy": "channel", "group_size": None, "actorder": "static"}), "pack-quantized", Facts((-1,))),
        ({"config_groups": {"W4A16": ["Linear"]}, "format": "pack-quantized"}, "pack-quantized", Facts((128,))),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "gptq", Facts((64,), 7)),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq", Facts()),
        ({"quant_method": "gptq", "checkpoint_format": "marlin_24", "group_size": -1}, "gptq marlin_24", Facts((-1,))),
        ({"quant_method": "gptq", "is_marlin_24_format": True}, "gptq marlin_24", Facts()),
        ({"quant_method": "marlin", "group_size": 128}, "marlin", Facts((128,))),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, "awq", Facts((128,))),
    ]
    for config, name, facts in cases:
        described = describe_published(config, "config.json")
        assert [form.name for form in described.formats] == [name]
        assert described.facts == facts


def _write(folder: Path, tensors: Tensors, quantization: Any, file: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    body = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(body))


def _named(tensors: Tensors) -> Tensors:
    return {f"up.{leaf}": tensor for leaf, tensor in tensors.items()}


def test_directory_without_description_is_refused(tmp_path: Path):
    _write(tmp_path, _named(_tensors("awq")), None)
    with pytest.raises(CheckpointError, match=r"the model must be quantized \(key quantization_config\); got no such"):
        open_published(tmp_path)


def test_directory_is_described_by_the_file_beside_config(tmp_path: Path):
    _write(tmp_path, _named(_tensors("gptq")), None, file="gptq_model-4bit-32g.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    opened = open_published(tmp_path)
    assert [(name, form.name) for name, form in opened.layers.items()] == [("up", "gptq")]
    assert opened.read("up").kind == "w4a16_sp24"


def test_directory_of_pickles_is_refused(tmp_path: Path):
    _write(tmp_path, _named(_tensors("awq")), {"quant_method": "awq"})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"and pickles\. Pickles run code when opened: ask for a safetensors"):
        open_published(tmp_path)


def test_index_that_leaves_the_directory_is_refused(tmp_path: Path):
    _write(tmp_path / "model", _named(_tensors("awq")), {"quant_method": "awq"})
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {f"up.{leaf}": "../other.safetensors" for leaf in ("qweight", "qzeros", "scales")}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="files must lie in"):
        open_published(tmp_path / "model")


def test_link_that_leaves_the_directory_is_refused(tmp_path: Path):
    _write(tmp_path / "model", _named(_tensors("awq")), {"quant_method": "awq"})
    (tmp_path / "model" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="files must lie in"):
        open_published(tmp_path / "model")


def test_layer_with_tensors_of_two_kinds_is_refused(tmp_path: Path):
    tensors = _named(pack_awq(random_weight(64, 128, 32, True)))
    tensors["up.weight"] = torch.zeros(64, 128)
    _write(tmp_path, tensors, {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"awq, layer up: the layer may only have .*; got weight\."):
        open_published(tmp_path)


def test_directory_without_layers_of_its_format_is_refused(tmp_path: Path):
    _write(tmp_path, {"up.weight": torch.zeros(64, 128)}, _ct(format="marlin-24"))
    with pytest.raises(CheckpointError, match=r"layers with the tensors of marlin-24 \(weight_packed, .*; got none\."):
        open_published(tmp_path)


def test_truncated_file_is_refused(tmp_path: Path):
    _write(tmp_path, _named(_tensors("awq")), {"quant_method": "awq"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"data_offsets must rise and lie within"):
        open_published(tmp_path)
