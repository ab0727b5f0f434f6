"""The directory format: descriptions, headers and values are checked before use; what is tampered with is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from marlin.errors import CheckpointError
from marlin.formats import CompressedWeight, DenseInt4Weight, top2_mask
from marlin.formats.atomic import replace_directory
from marlin.formats.checkpoint import (
    LayerSpec,
    check_inside,
    describe,
    is_directory_of_ours,
    open_directory,
    packed_meta_is_legal,
    parse_description,
    read_directory_summary,
)
from marlin.formats.layouts import PackedWeight, pack, unpack
from marlin.formats.safetensors_header import read_header
from marlin.formats.sparsity import LEGAL_NIBBLES

SPARSE, DENSE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
# Why these extents: N and K are no multiples of the tile, so that padding is there to be counted wrongly.
SPECS = {SPARSE: LayerSpec("w4a16_sp24", 32, 72, 96), DENSE: LayerSpec("w4a16_dense", -1, 96, 160)}
AGAIN = "Save the model again with marlin.save_pretrained."
ALTERED = "The file is truncated or altered: copy or download it again."


def random_weight(spec: LayerSpec) -> CompressedWeight | DenseInt4Weight:
    groups = 1 if spec.group_size == -1 else spec.k // spec.group_size
    codes = torch.randint(-8, 8, (spec.n, spec.k), dtype=torch.int8)
    scales = torch.rand(spec.n, groups).add(0.5).half()
    if spec.kind == "w4a16_dense":
        return DenseInt4Weight(codes, scales, spec.group_size)
    return CompressedWeight.from_codes(codes, top2_mask(torch.rand(spec.n, spec.k)), scales, spec.group_size)


def layer_tensors(name: str, packed: PackedWeight) -> dict[str, torch.Tensor]:
    tensors = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items() if tensor is not None}


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    body = {"model_type": "llama", "quantization_config": describe(SPECS) if config is None else config}
    (directory / "config.json").write_text(json.dumps(body))
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    result = {"model.embed_tokens.weight": torch.rand(10, 6).half(), f"{SPARSE}.bias": torch.rand(72).half()}
    for name, spec in SPECS.items():
        result |= layer_tensors(name, pack(random_weight(spec)))
    return result


@pytest.fixture
def directory(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write(tmp_path / "model", tensors)


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


# Descriptions


def test_description_round_trips() -> None:
    assert parse_description(json.loads(json.dumps(describe(SPECS)))) == SPECS


def change_layer(**fields: Any) -> dict[str, Any]:
    config = describe(SPECS)
    config["layers"] = {"a.b": {"kind": "w4a16_sp24", "group_size": 64, "shape": [64, 128], **fields}}
    return config


HERE = "config.json, quantization_config"
BAD_DESCRIPTIONS = [
    ([], f"{HERE}: it must be a JSON object; got list. {AGAIN}"),
    (
        describe({}) | {"quant_method": "gptq"},
        f"{HERE}: quant_method must be 'sparse_marlin'; got 'gptq'. "
        "This directory was written by another method: load it with that one.",
    ),
    (describe({}) | {"version": 2}, f"{HERE}: version must be 1; got 2. Update sparse-marlin to read newer versions."),
    (describe({}) | {"version": True}, f"{HERE}: version must be 1; got True. {AGAIN}"),
    (describe({}) | {"version": "1"}, f"{HERE}: version must be 1; got '1'. {AGAIN}"),
    (describe({}) | {"layers": None}, f"{HERE}: layers must be a JSON object; got NoneType. {AGAIN}"),
    (
        describe({}) | {"layers": {"../x": {}}},
        f"{HERE}: names of layers must be module names, as model.layers.0.mlp.up_proj; got '../x'. {AGAIN}",
    ),
    (
        describe({}) | {"layers": {"a.b": 3}},
        f"{HERE}, layer a.b: the entry must have exactly kind, group_size and shape; got int. {AGAIN}",
    ),
    (
        change_layer(bits=4),
        f"{HERE}, layer a.b: the entry must have exactly kind, group_size and shape; "
        f"got ['bits', 'group_size', 'kind', 'shape']. {AGAIN}",
    ),
    (
        change_layer(kind="w8a8"),
        f"{HERE}, layer a.b: kind must be one of ('w4a16_sp24', 'w4a16_dense'); got 'w8a8'. "
        "A newer release may read it.",
    ),
    (
        change_layer(group_size=48),
        f"{HERE}, layer a.b: group_size must be one of (32, 64, 128, -1); got 48. {AGAIN}",
    ),
    (
        change_layer(group_size="64"),
        f"{HERE}, layer a.b: group_size must be one of (32, 64, 128, -1); got '64'. {AGAIN}",
    ),
    (change_layer(shape=[64]), f"{HERE}, layer a.b: shape must be [N, K]; got [64]. {AGAIN}"),
    (
        change_layer(shape=[60, 128]),
        f"{HERE}, layer a.b: N must be a positive multiple of 8 and K of 32; got shape=[60, 128]. {AGAIN}",
    ),
    (change_layer(shape=[64, 96]), f"{HERE}, layer a.b: K must be a multiple of group_size=64; got K=96. {AGAIN}"),
]


@pytest.mark.parametrize(("config", "text"), BAD_DESCRIPTIONS, ids=[str(i) for i in range(len(BAD_DESCRIPTIONS))])
def test_description_is_refused(config: Any, text: str) -> None:
    assert refusal(lambda: parse_description(config)) == text


# Reading


def test_directory_gives_back_the_packed_weights(tmp_path: Path) -> None:
    weights = {name: random_weight(spec) for name, spec in SPECS.items()}
    tensors = {key: t for name, weight in weights.items() for key, t in layer_tensors(name, pack(weight)).items()}
    checkpoint = open_directory(write(tmp_path / "model", tensors)).check_all_values()
    for name, weight in weights.items():
        assert torch.equal(unpack(checkpoint.packed(name)).to_dense(), weight.to_dense())


def test_summary_counts_bytes_and_zeros(tmp_path: Path) -> None:
    weights = {name: random_weight(spec) for name, spec in SPECS.items()}
    tensors = {key: t for name, weight in weights.items() for key, t in layer_tensors(name, pack(weight)).items()}
    tensors |= {f"{DENSE}.bias": torch.zeros(96), "lm_head.weight": torch.rand(8, 4).bfloat16()}
    summary = read_directory_summary(write(tmp_path / "model", tensors))
    assert {layer.name: layer.spec for layer in summary.layers} == SPECS
    for layer in summary.layers:
        packed = pack(weights[layer.name])
        assert layer.nbytes == packed.nbytes
        assert layer.bits_per_weight == 8 * packed.nbytes / (packed.n * packed.k)
        dense = weights[layer.name].dense_codes()
        assert layer.zero_fraction == pytest.approx(float((dense == 0).double().mean()), abs=1e-12)
    assert summary.unquantized_bytes == {f"{DENSE}.bias": 384, "lm_head.weight": 64}
    assert summary.total_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_summary_lists_layers_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    spec = LayerSpec("w4a16_sp24", 64, 64, 64)
    names = [f"model.layers.{index}.{leaf}" for index in (2, 10, 11) for leaf in ("down_proj", "up_proj")]
    packed = pack(random_weight(spec))
    tensors = {key: t.clone() for name in names for key, t in layer_tensors(name, packed).items()}
    config = describe(dict.fromkeys(sorted(names), spec))
    assert [row.name for row in read_directory_summary(write(tmp_path / "model", tensors, config)).layers] == names


def test_summary_reads_no_codes_until_asked(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin.formats.checkpoint.safe_open", None)
    summary = read_directory_summary(directory)
    assert summary.bits_per_weight > 0 and "zero_fraction" not in summary.layers[0].to_dict(zero_fraction=False)
    with pytest.raises(TypeError):
        _ = summary.layers[0].zero_fraction


def shard(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Two files and an index in place of one file; returns the index."""
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_through_the_index(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard(directory, tensors)
    checkpoint = open_directory(directory).check_all_values()
    assert set(checkpoint.tensors) == set(tensors)
    assert torch.equal(checkpoint.read(f"{SPARSE}.meta"), tensors[f"{SPARSE}.meta"])


@pytest.mark.parametrize("place", ["../other.safetensors", "/tmp/other.safetensors", "sub/../../other.safetensors"])
def test_index_that_points_outside_is_refused(directory: Path, tensors: dict[str, torch.Tensor], place: str) -> None:
    index = shard(directory, tensors)
    save_file({"x": torch.zeros(1)}, directory.parent / "other.safetensors")
    index["weight_map"]["x"] = place
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    need = "weight_map must name .safetensors files of this directory" if place[0] == "/" else "files must lie in "
    need += "" if place[0] == "/" else str(directory)
    got = repr(place) if place[0] == "/" else place
    fix = "Do not load it: a checkpoint has no reason to read other files."
    assert refusal(lambda: open_directory(directory)) == f"{path}: {need}; got {got}. {fix}"


def test_link_that_leaves_the_directory_is_refused(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    os.rename(directory / "model.safetensors", outside)
    (directory / "model.safetensors").symlink_to(outside)
    text = refusal(lambda: open_directory(directory))
    assert text.startswith(f"{directory}: files must lie in {directory}; got model.safetensors. Do not load it")


def test_links_of_a_download_cache_are_followed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.parent.mkdir()
    write(blobs, tensors)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    assert set(open_directory(snapshot).layers) == set(SPECS)
    (blobs / "model.safetensors").rename(tmp_path / "x")
    (blobs / "model.safetensors").symlink_to(tmp_path / "x")
    with pytest.raises(CheckpointError, match="files must lie in"):
        check_inside(snapshot, snapshot / "model.safetensors", "x")


def test_index_and_files_must_agree(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    index = shard(directory, tensors)
    path = directory / "model.safetensors.index.json"
    name, file = sorted(index["weight_map"].items())[0]
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    need = "index and files must name the same tensors"
    assert refusal(lambda: open_directory(directory)) == f"{path}: {need}; got {name!r} not in the index. {ALTERED}"
    index["weight_map"] |= {name: file, "ghost": file}
    path.write_text(json.dumps(index))
    assert refusal(lambda: open_directory(directory)) == f"{path}: {need}; got 'ghost' not in {file}. {ALTERED}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    text = refusal(lambda: open_directory(directory))
    assert text.startswith(f"{directory / name}: the file must be readable; got No such file or directory. Check ")


def test_uncompressed_model_is_told_apart(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text('{"model_type": "llama"}')
    fix = "Compress the model first: marlin compress MODEL OUT."
    need = "the model must be compressed (key quantization_config)"
    assert refusal(lambda: open_directory(directory)) == f"{path}: {need}; got no such key. {fix}"
    assert not is_directory_of_ours(directory)


# Headers


def test_truncated_file_is_refused_at_every_length(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated or altered"):
            read_header(file)


def test_truncated_data_names_the_tensor(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    have = len(data) - 8 - length - 1
    file.write_bytes(data[:-1])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n, entry in header.items() if entry["data_offsets"][1] == have + 1)
    offsets = header[name]["data_offsets"]
    need = f"data_offsets must rise and lie within the {have} bytes of data"
    assert refusal(lambda: read_header(file)) == f"{file}, tensor {name!r}: {need}; got {offsets}. {ALTERED}"


@pytest.mark.parametrize("length", [1 << 40, 2**64 - 1, -1])
def test_header_length_that_lies_is_refused(directory: Path, length: int) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = length if length > 0 else len(data) - 7
    file.write_bytes(struct.pack("<Q", length) + data[8:])
    need = f"header length must be at most {len(data) - 8} in a file of {len(data)} bytes"
    assert refusal(lambda: read_header(file)) == f"{file}: {need}; got {length}. {ALTERED}"


def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"{SPARSE}.codes"].__setitem__(key, value)


BAD_ENTRIES = [
    (set_entry("dtype", "F12"), "dtype must be one of F4, .*; got 'F12'"),
    (set_entry("dtype", ["I32"]), r"dtype must be one of .*; got \['I32'\]"),
    (set_entry("shape", [2, 2, -256]), r"shape must be a list of integers of at least 0; got \[2, 2, -256\]"),
    (set_entry("shape", [2, 2, 256.0]), r"shape must be a list of integers of at least 0; got \[2, 2, 256.0\]"),
    (set_entry("shape", [2, 2, 1 << 62]), r"must take \d+ bytes; got 4096 bytes"),
    (set_entry("data_offsets", [0]), r"data_offsets must be two integers of at least 0; got \[0\]"),
    (set_entry("data_offsets", [8, 0]), r"data_offsets must rise and lie within the \d+ bytes of data; got \[8, 0\]"),
    (set_entry("data_offsets", [0, 1 << 60]), "data_offsets must rise and lie within"),
    (set_entry("extra", 1), "the entry must have exactly dtype, shape and data_offsets; got"),
    (lambda header: header.update({f"{SPARSE}.codes": 5}), "the entry must have exactly .*; got int"),
]


@pytest.mark.parametrize(("change", "text"), BAD_ENTRIES, ids=[str(i) for i in range(len(BAD_ENTRIES))])
def test_entry_that_lies_is_refused(directory: Path, change: Callable[[dict[str, Any]], None], text: str) -> None:
    file = directory / "model.safetensors"
    edit_header(file, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}, tensor '{SPARSE}.codes': ") and str(caught.value).endswith(ALTERED)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, file)
    edit_header(file, lambda header: header["b"].__setitem__("data_offsets", [0, 16]))
    need = "data of tensors must lie end to end"
    assert refusal(lambda: read_header(file)) == f"{file}, tensor 'b': {need}; got 0 after 16: they overlap. {ALTERED}"


def test_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4), "c": torch.ones(4)}, file)
    edit_header(file, lambda header: header.pop("b"))
    assert "got 32 after 16: they leave a hole" in refusal(lambda: read_header(file))
    edit_header(file, lambda header: header.pop("c"))
    assert "the file must end with its 16 bytes of data; got 48 bytes" in refusal(lambda: read_header(file))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"\xff\xfe", "the text must be JSON in UTF-8; got UnicodeDecodeError"),
        (b"{", "the text must be JSON in UTF-8; got JSONDecodeError"),
        (b"[" * 100_000, "the text must be JSON in UTF-8; got RecursionError"),
        (b"[]", "the header must be a JSON object; got list"),
        (b'{"a": 1, "a": 2}', "every key must appear once; got ['a'] more than once"),
    ],
    ids=["not-utf8", "not-json", "deep", "list", "repeated"],
)
def test_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes, text: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert text in refusal(lambda: read_header(file))


@given(position=st.integers(min_value=0), value=st.integers(min_value=0, max_value=255))
def test_any_changed_header_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int32)}, file)
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[position % (8 + length)] = value
    file.write_bytes(bytes(data))
    try:
        entries = read_header(file)
    except CheckpointError:
        return
    assert sum(entry.nbytes for entry in entries.values()) == 44


# Tensors of a layer


def test_missing_tensor_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{SPARSE}.meta"]
    directory = write(tmp_path / "model", tensors)
    need = f"w4a16_sp24 layer {SPARSE} must have a tensor '{SPARSE}.meta'"
    fix = "Copy or download all of the files again."
    assert refusal(lambda: open_directory(directory)) == f"{directory}: {need}; got none. {fix}"


BAD_TENSORS = [
    ("codes", lambda t: t.long(), "dtype must be I32; got I64"),
    ("meta", lambda t: t.float(), "dtype must be I32; got F32"),
    ("scales", lambda t: t.double(), "dtype must be F16 or BF16 or F32; got F64"),
    ("scales", lambda t: t[:1].clone(), "shape must be [2, 3, 64]; got [1, 3, 64]"),
    ("codes", lambda t: t.flatten(), "shape must be [2, 2, 256]; got [1024]"),
    ("bias", lambda t: t[:64].clone(), "shape must be [72]; got [64]"),
]


@pytest.mark.parametrize(("leaf", "change", "text"), BAD_TENSORS, ids=[f"{b[0]}{i}" for i, b in enumerate(BAD_TENSORS)])
def test_tensor_of_wrong_dtype_or_shape_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    leaf: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    text: str,
) -> None:
    name = f"{SPARSE}.{leaf}"
    tensors[name] = change(tensors[name])
    directory = write(tmp_path / "model", tensors)
    expected = f"{directory / 'model.safetensors'}, tensor {name!r}: {text}. {AGAIN}"
    assert refusal(lambda: open_directory(directory)) == expected


@pytest.mark.parametrize(("layer", "leaf"), [(SPARSE, "weight"), (DENSE, "meta")])
def test_tensor_that_the_kind_does_not_have_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], layer: str, leaf: str
) -> None:
    tensors[f"{layer}.{leaf}"] = torch.zeros(4)
    directory = write(tmp_path / "model", tensors)
    may = "codes, meta, scales, bias" if layer == SPARSE else "codes, scales, bias"
    need = f"{SPECS[layer].kind} layer {layer} may only have {may}"
    expected = f"{directory / 'model.safetensors'}: {need}; got '{layer}.{leaf}'. {AGAIN}"
    assert refusal(lambda: open_directory(directory)) == expected


# Values


@pytest.mark.parametrize("nibble", range(16))
@pytest.mark.parametrize("place", range(8))
def test_packed_meta_is_legal_exactly_for_the_legal_nibbles(nibble: int, place: int) -> None:
    words = torch.full((2, 3, 128), 0x44444444, dtype=torch.int64)
    words[1, 2, 77] = (0x44444444 & ~(15 << 4 * place)) | nibble << 4 * place
    meta = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    assert packed_meta_is_legal(meta) == (nibble in LEGAL_NIBBLES)


def test_illegal_metadata_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{SPARSE}.meta"][1, 1, 5] = 0
    checkpoint = open_directory(write(tmp_path / "model", tensors))
    need = "every metadata nibble must hold two rising positions (i0 | i1 << 2 with i0 < i1)"
    expected = f"{checkpoint.directory}, layer {SPARSE}: {need}; got an illegal nibble in meta. {AGAIN}"
    assert refusal(checkpoint.check_all_values) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors[f"{DENSE}.scales"][0, 0, 3] = value
    checkpoint = open_directory(write(tmp_path / "model", tensors))
    expected = (
        f"{checkpoint.directory}, layer {DENSE}: scales must be finite; got NaN or infinity in torch.float16. {AGAIN}"
    )
    assert refusal(checkpoint.check_all_values) == expected


# Replacing a directory


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_replace_directory_writes_beside_and_renames(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with replace_directory(target) as temporary:
        assert temporary.parent == target.parent and temporary.name == f"model.tmp-{os.getpid()}"
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert content(tmp_path) == {"new/model/a": "1"}


def test_replace_directory_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk"):
        with replace_directory(tmp_path / "new" / "deep" / "model") as temporary:
            (temporary / "a").write_text("1")
            raise RuntimeError("disk")
    assert list(tmp_path.iterdir()) == []


def test_replace_directory_keeps_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("0")
    rename = os.rename

    def fail_into_place(source: Path, destination: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OSError, match="no"):
        with replace_directory(target, overwrite=True) as temporary:
            (temporary / "a").write_text("1")
    assert content(tmp_path) == {"model/old": "0"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_replace_directory_replaces_only_what_it_may(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with replace_directory(target) as temporary:  # empty: may go
        (temporary / "a").write_text("1")
    with pytest.raises(FileExistsError) as caught:
        replace_directory(target).__enter__()
    assert str(caught.value) == (
        f"save {target}: an existing directory must be empty or a previous save; got other content (1 entries). "
        "Choose another path, or pass overwrite=True to replace it with everything in it."
    )
    assert content(tmp_path) == {"model/a": "1"}
    with replace_directory(target, is_ours=lambda path: (path / "a").exists()) as temporary:
        (temporary / "b").write_text("2")
    assert content(tmp_path) == {"model/b": "2"}
    with replace_directory(target, overwrite=True) as temporary:
        (temporary / "c").write_text("3")
    assert content(tmp_path) == {"model/c": "3"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_replace_directory_refuses_a_file(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("keep")
    with pytest.raises(NotADirectoryError) as caught:
        replace_directory(target, overwrite=True).__enter__()
    assert str(caught.value) == f"save {target}: the target must be a directory; got a file. Choose another path."
    assert target.read_text() == "keep"
